"""The papers' plots: one module per figure, discovered by `scripts/reproduce.py`, which is this
folder's command.

A module is a figure:

    docstring   first line "Author year, figure: what it shows (arXiv id)"; then what is verified and how, what is not
    Config      frozen dataclass, `seed: int = 0` and sizes; the defaults run in some ten seconds on two cores
    SMALL       dict of overrides of Config: sizes for tests, seconds with compilation
    CONTROLS    dict name -> dict of overrides on top of SMALL: a nearby wrong setting, for which a claim must fail
    run(config) -> xr.Dataset           the only expensive part; pure; holds all that `plot` and `check` need
    plot(ds)    -> matplotlib Figure    never recomputes
    check(ds)   -> tuple[Claim, ...]    what the paper says, against what was measured (`papers.common`)
    TIER        1 (the default where it is left out): initialisation only; 2: small training

`check` expects what the paper's setting gives, whatever the config was: so a wrong setting fails. A
module changes none of JAX's global settings (`with jax.enable_x64(True)` is local), imports nothing
from another figure, and keeps complex numbers as two real variables, which netCDF can hold. Names
that start with an underscore, and `common`, are no figures.
"""

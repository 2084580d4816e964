"""The papers' plots, one module per figure; `scripts/reproduce.py` finds and runs them.

A module is a figure:

    docstring   first line "Author year, figure: what it shows (arXiv id)"; then what is verified
                and how, and what is not covered
    Config      frozen dataclass, `seed: int = 0` and sizes; the defaults run in some ten seconds
                on two cores
    SMALL       dict of overrides of Config: sizes for tests, seconds with compilation
    CONTROLS    dict name -> dict of overrides on top of SMALL: a nearby wrong setting, for which a
                claim must fail
    run(config) -> xr.Dataset           the only expensive part; pure; holds all that `plot` and
                                        `check` need
    plot(ds)    -> matplotlib Figure    never recomputes
    check(ds)   -> tuple[Claim, ...]    what the paper says against what was measured
                                        (`papers.common`)
    TIER        1 (the default): initialisation only; 2: small training

`check` expects what the paper's setting gives, whatever the config was, so a wrong setting fails. A
module changes none of JAX's global settings (`with jax.enable_x64(True)` is local), imports nothing
from another figure, and keeps complex numbers as two real variables, which netCDF can hold.
`common` and names that start with an underscore are not figures.
"""

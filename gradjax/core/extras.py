"""The packages that only the laboratory, the figures and the files need: the extra `gradjax[lab]`.

They are imported where they are used, inside `needed_for`, which turns a missing one into one line
that says what to install:

    with needed_for("Diagnosis.figure"):
        import matplotlib.pyplot as plt
"""

import contextlib
from collections.abc import Iterator

LAB = ("xarray", "pandas", "h5py", "h5netcdf", "matplotlib", "sklearn", "pooch", "tyro")


@contextlib.contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Import packages of the `lab` extra inside this context.

    Args:
      what: what the user asked for, which begins the message: a function, a command, a file.

    Raises:
      ImportError: a package of the extra is missing; says which one and how to install it. Any
        other failure of an import passes unchanged.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in LAB:
            raise
        raise ImportError(
            f"{what} needs {package}, which is not installed; run: pip install 'gradjax[lab]'",
            name=package,
        ) from error

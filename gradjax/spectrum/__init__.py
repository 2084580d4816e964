"""The full singular spectrum of a layer product, its Lyapunov exponents and its moments."""

from gradjax.core.names import suggest_names
from gradjax.spectrum.exponents import LyapunovExponents, lyapunov_exponents, moments
from gradjax.spectrum.jacobian import (
    JacobianSpectrum,
    SpectrumInfo,
    jacobian_spectrum,
    log_singular_values,
)

__all__ = [
    "JacobianSpectrum",
    "LyapunovExponents",
    "SpectrumInfo",
    "jacobian_spectrum",
    "log_singular_values",
    "lyapunov_exponents",
    "moments",
]

__getattr__ = suggest_names(__name__, __all__)

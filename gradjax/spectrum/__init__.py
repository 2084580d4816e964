"""The full singular spectrum of a layer product, its Lyapunov exponents and its moments."""

from gradjax.spectrum.exponents import LyapunovExponents as LyapunovExponents
from gradjax.spectrum.exponents import lyapunov_exponents as lyapunov_exponents
from gradjax.spectrum.exponents import moments as moments
from gradjax.spectrum.jacobian import JacobianSpectrum as JacobianSpectrum
from gradjax.spectrum.jacobian import SpectrumInfo as SpectrumInfo
from gradjax.spectrum.jacobian import jacobian_spectrum as jacobian_spectrum
from gradjax.spectrum.jacobian import log_singular_values as log_singular_values

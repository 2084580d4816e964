"""What random matrix theory predicts for the layer product J = D_L W_L ... D_1 W_1.

    W_l = sigma_w * (Gaussian of variance 1/N, or Haar orthogonal),
    D_l = diag phi'(h_l),
    lambda = sigma^2(J)

`moments` holds Newman's exponents, the Fuss-Catalan numbers, the exact moments at finite width,
Hanin and Nica's law of log ||J u||^2 and the eigenvalues of Ginibre products; `density` holds the
free-probability spectrum of J J^T at finite and infinite depth. Every entry of D is taken to be
independent with the law of phi'(sqrt(q*) z), z ~ N(0, 1): mean field, exact for linear networks and
for ReLU networks without bias (a sign is independent of |h|), an approximation of order 1/N for
the others. Not covered: tied (recurrent) weights, unequal widths in the densities, the 1/N
corrections of the densities.

Pure JAX in the caller's dtype; quantities that can overflow are natural logarithms.
"""

from gradjax.core.names import suggest_names
from gradjax.theory.random_matrix.checks import WEIGHTS as WEIGHTS
from gradjax.theory.random_matrix.density import CLASSES as CLASSES
from gradjax.theory.random_matrix.density import DerivativeLaw as DerivativeLaw
from gradjax.theory.random_matrix.density import ProductDensity as ProductDensity
from gradjax.theory.random_matrix.density import derivative_law as derivative_law
from gradjax.theory.random_matrix.density import derivative_moment as derivative_moment
from gradjax.theory.random_matrix.density import limit_density as limit_density
from gradjax.theory.random_matrix.density import product_density as product_density
from gradjax.theory.random_matrix.density import relative_variance as relative_variance
from gradjax.theory.random_matrix.moments import NormMoments as NormMoments
from gradjax.theory.random_matrix.moments import fuss_catalan_log_moment as fuss_catalan_log_moment
from gradjax.theory.random_matrix.moments import ginibre_product_cdf as ginibre_product_cdf
from gradjax.theory.random_matrix.moments import log_second_moments as log_second_moments
from gradjax.theory.random_matrix.moments import newman_exponents as newman_exponents
from gradjax.theory.random_matrix.moments import newman_limit as newman_limit
from gradjax.theory.random_matrix.moments import newman_variance as newman_variance
from gradjax.theory.random_matrix.moments import norm_moments as norm_moments

__getattr__ = suggest_names(__name__)

"""Top singular values, spectral densities, traces, curvature of Jacobians that are never formed.

    J v_i = sigma_i u_i,  J^T u_i = sigma_i v_i
    tr f(J^T J) = E z^T f(J^T J) z,  z_j = +-1
    H = d^2 loss / d params^2,   G = J_f^T (d^2 loss / d f^2) J_f

J = d h_L / d h_0 belongs to a step, a list of links, or any function. The trace is Hutchinson's
(1990), with Lanczos for f (Ubaru, Chen, Saad 2017); G is Schraudolph's (2002).

J is applied through `jax.vjp` and its transpose, as gradients are: a step with a custom_vjp gives
the Jacobian that training sees. A whole block of vectors goes through a layer at once, as rows, so
that its weights are read once per block. After every layer the block is rescaled by one common
power of two, which is exact: the top singular values of a product of gain 2 and depth 10,000 are
found although none of them is a float32. Block Krylov (Halko, Martinsson, Tropp 2009; Musco, Musco
2015) is ours; bidiagonalisation, Lanczos and Monte Carlo are matfree's (Kraemer et al.).

Singular values below 1e-7 (float32) of the largest are not covered: the common power of two loses
them, and their residual says so (`gradjax.log_singular_values` finds them all, at O(depth *
width^3)). Nor are complex states.

Cost: `top_singular_values` 2 (num_iters + 1) blocks through J, O(block * num_iters * width) memory;
Monte Carlo num_samples * 2 num_matvecs vectors, the samples as one block. The states of every
layer are stored, and its residuals of up to 8 times their size, O(depth * width); larger residuals
(the weights, or what a key draws) are computed again.
"""

from gradjax.core.names import suggest_names
from gradjax.matrix_free.curvature import gauss_newton_operator, hessian_operator, sharpness
from gradjax.matrix_free.krylov import (
    TopEigenvalues,
    TopSingular,
    top_eigenvalues,
    top_singular_values,
)
from gradjax.matrix_free.stochastic import (
    Estimate,
    SpectralDensity,
    log_moments,
    singular_value_density,
    spectral_density,
    trace,
)

__all__ = [
    "gauss_newton_operator",
    "hessian_operator",
    "sharpness",
    "TopEigenvalues",
    "TopSingular",
    "top_eigenvalues",
    "top_singular_values",
    "Estimate",
    "SpectralDensity",
    "log_moments",
    "singular_value_density",
    "spectral_density",
    "trace",
]

__getattr__ = suggest_names(__name__, __all__)

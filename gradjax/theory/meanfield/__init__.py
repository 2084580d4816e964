"""Mean field theory of wide random networks: lengths, angles and gradients along the depth.

A layer h' = W phi(h) + b with W_ij ~ N(0, sigma_w^2 / fan_in), b_i ~ N(0, sigma_b^2), at infinite
width:

    length        q' = sigma_w^2 E phi(sqrt(q) z)^2 + sigma_b^2             fixed point q*
    correlation   c' = (sigma_w^2 E phi(u_1) phi(u_2) + sigma_b^2) / q*     fixed point c*
    gradient      chi_1 = sigma_w^2 E phi'(sqrt(q*) z)^2, the factor of ||dL/dh||^2 per layer

with u_1, u_2 Gaussian of variance q* and correlation c (Poole et al. 2016, arXiv 1606.05340;
Schoenholz et al. 2017, arXiv 1611.01232). Orthogonal weights of gain sigma_w have the same maps, as
do circular convolutions with Var W = sigma_w^2 / (kernel size * channels in) for signals that do
not vary in space (Xiao et al. 2018, arXiv 1806.05393). Not covered: max pooling, zero padding,
attention, training.

Every function takes numbers or arrays that broadcast, and is pure, jitted, differentiable and
vmappable in them, in their own dtype (float32 for narrower ones). The activation is a name of
`ACTIVATIONS` or an elementwise callable (compiled once per object). The remaining options are
keywords shared by every function:

    dropout     rate of inverted dropout on phi(h), with new masks for each input (Schoenholz 2017)
    layernorm   phi(LayerNorm(h)) in place of phi(h): the length that phi sees is then 1
    q0          length of the first layer, from which the length map runs to its limit q*; default 1
    kinks       where a derivative of a callable activation jumps

Missing values are marked. q* is inf where the length map has no limit (ReLU with sigma_w^2 > 2, or
= 2 with sigma_b > 0; anything above 1e8 counts), and NaN where the search failed or the activation
has no second moment; c* is then 1 and the moments are those of q = 1e8. ReLU at sigma_w^2 = 2,
sigma_b = 0 keeps every length: q* = q0. Fixed points are bracketed roots, found to rounding in some
ten evaluations however critical the point, and their derivatives come from the implicit function
theorem (`lax.custom_root`). One moment costs 96 evaluations of phi, one pair moment some 3,000 to
7,000 (times four for two kinks). A 200 x 200 diagram of (q*, chi_1) takes a second on two cores; c*
and the depth scales take 22 s of processor time.
"""

from gradjax.core.names import suggest_names
from gradjax.theory.meanfield.architectures import Gated as Gated
from gradjax.theory.meanfield.architectures import Residual as Residual
from gradjax.theory.meanfield.architectures import batchnorm_growth as batchnorm_growth
from gradjax.theory.meanfield.architectures import gated as gated
from gradjax.theory.meanfield.architectures import residual as residual
from gradjax.theory.meanfield.phase import DepthScales as DepthScales
from gradjax.theory.meanfield.phase import PhaseDiagram as PhaseDiagram
from gradjax.theory.meanfield.phase import c_star as c_star
from gradjax.theory.meanfield.phase import chi_1 as chi_1
from gradjax.theory.meanfield.phase import chi_2 as chi_2
from gradjax.theory.meanfield.phase import correlation_map as correlation_map
from gradjax.theory.meanfield.phase import critical_line as critical_line
from gradjax.theory.meanfield.phase import critical_sigma_w as critical_sigma_w
from gradjax.theory.meanfield.phase import curvature_map as curvature_map
from gradjax.theory.meanfield.phase import depth_scales as depth_scales
from gradjax.theory.meanfield.phase import gradient_correlation as gradient_correlation
from gradjax.theory.meanfield.phase import length_map as length_map
from gradjax.theory.meanfield.phase import phase_diagram as phase_diagram
from gradjax.theory.meanfield.phase import q_star as q_star

__getattr__ = suggest_names(__name__)

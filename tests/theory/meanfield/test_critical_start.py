"""Every activation starts at criticality where the theory has such a point."""

import jax
import numpy as np
import pytest

from gradjax.core.activations import ACTIVATIONS
from gradjax.theory import meanfield

# sigma_b at which the critical length is stable: any for most; those of half-stable criticality
# need some (Roberts, Yaida, Hanin 2021, arXiv 2106.10165, section 5.3.3: GELU from 0.416 on).
# Softplus has none.
BIASES = {"gelu": 0.5, "silu": 0.8}
# tanh is fast in test_phase, whose compiled programs it shares.
QUICK = ("tailored_relu",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ACTIVATIONS],
)
def test_every_activation_has_a_critical_start(name):
    """chi_1 = 1 at the limit of the lengths; 2% more sigma_w is chaos or explosion.

    Softplus has no critical point.
    """
    with jax.enable_x64(True):
        sigma_b = BIASES.get(name, 0.0)
        sigma_w = meanfield.critical_sigma_w(sigma_b, name)
        if name == "softplus":
            assert np.isnan(sigma_w)
            return
        chi = float(meanfield.chi_1(sigma_w, sigma_b, name))
        assert abs(chi - 1) < 1e-9
        assert abs(float(meanfield.chi_1(1.02 * sigma_w, sigma_b, name)) - 1) > 1e-4

"""The phase diagram of an activation: where gradients vanish or explode, and over how many layers.

    python scripts/phase_diagram.py tanh.png --activation tanh --points 60

Four panels over (sigma_w, sigma_b): the length q*, the factor chi_1 of the squared gradient per
layer, and the depth scales xi_q and xi_c. The line is the edge of chaos, chi_1 = 1; blank is where
the length has no limit. Schoenholz et al. 2017 (arXiv 1611.01232). 60 x 60 points take a few
seconds on two cores.
"""

import argparse
import time

import jax
import matplotlib
import numpy as np

from gradjax.core.activations import ACTIVATIONS
from gradjax.theory import meanfield

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the image to write, e.g. tanh.png")
    parser.add_argument("--activation", default="tanh", choices=ACTIVATIONS)
    parser.add_argument("--points", type=int, default=60, help="grid points per axis")
    parser.add_argument(
        "--sigma-w", type=float, nargs=2, default=(0.5, 3.0), metavar=("LOW", "HIGH")
    )
    parser.add_argument(
        "--sigma-b", type=float, nargs=2, default=(0.01, 1.0), metavar=("LOW", "HIGH")
    )
    args = parser.parse_args()

    jax.config.update("jax_enable_x64", True)
    sigma_w, sigma_b = (np.linspace(*ends, args.points) for ends in (args.sigma_w, args.sigma_b))
    began = time.perf_counter()
    diagram = jax.block_until_ready(
        meanfield.phase_diagram(sigma_w[:, None], sigma_b[None, :], args.activation)
    )
    critical = meanfield.critical_sigma_w(sigma_b, args.activation)
    seconds = time.perf_counter() - began
    print(f"{args.points} x {args.points} points in {seconds:.1f} s, compilation included")

    panels = [  # name, values, colour map, limits
        ("length $q^*$", diagram.q_star, "viridis", (None, None)),
        (r"log gradient growth per layer, $\log\chi_1$", np.log(diagram.chi_1), "RdBu_r", (-1, 1)),
        (r"depth scale of lengths, $\log_{10}\xi_q$", np.log10(diagram.xi_q), "magma", (-0.5, 2)),
        (
            r"depth scale of correlations, $\log_{10}\xi_c$",
            np.log10(diagram.xi_c),
            "magma",
            (-0.5, 2),
        ),
    ]
    figure, axes = plt.subplots(
        2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained"
    )
    for row, axis, (title, values, colours, (low, high)) in zip(
        (0, 0, 1, 1), axes.flat, panels, strict=True
    ):
        values = np.ma.masked_invalid(np.asarray(values).T)
        mesh = axis.pcolormesh(
            sigma_w, sigma_b, values, cmap=colours, vmin=low, vmax=high, shading="nearest"
        )
        figure.colorbar(mesh, ax=axis)
        axis.plot(critical, sigma_b, "kw"[row], lw=2, label="edge of chaos, $\\chi_1 = 1$")
        axis.set(title=title, xlim=args.sigma_w, ylim=args.sigma_b)
    for axis in axes[-1]:
        axis.set_xlabel(r"$\sigma_w$")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"$\sigma_b$")
    axes[0, 0].legend(loc="lower right")
    axes[0, 1].text(
        0.3, 0.9, "ordered:\nvanishing", transform=axes[0, 1].transAxes, ha="center", va="top"
    )
    axes[0, 1].text(
        0.8, 0.25, "chaotic:\nexploding", transform=axes[0, 1].transAxes, ha="center", va="top"
    )
    figure.suptitle(f"Mean field phase diagram, {args.activation}")
    figure.savefig(args.output, dpi=120)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

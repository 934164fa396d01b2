"""Curves, as PNG files."""

from pathlib import Path


def plot_alpha(results: dict[str, list[float | None]], path: Path) -> None:
    """alpha_k over the slots, a line for each named result."""
    curves = {}
    for name, alpha in results.items():
        curves[name] = [(k, a) for k, a in enumerate(alpha, start=1) if a is not None]
    plot_curves(
        curves,
        path,
        xlabel="slot k",
        ylabel="conditional acceptance α_k",
        ylim=(0, 1),
        title="Accepted, given that slot k was reached",
    )


def plot_curves(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    ylim: tuple[float, float] | None = None,
) -> None:
    """A line through the (x, y) points of each named curve."""
    import matplotlib

    # a machine without a screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if ylim is not None:
        axes.set_ylim(ylim)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)

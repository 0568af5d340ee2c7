"""The table and the picture of the speed benchmark."""

from pathlib import Path


def print_rows(title: str, rows: list[dict]) -> None:
    """A table: seconds, ratio and interval, A/A, and how the bound stands."""
    width = max(len(row["name"]) for row in rows)
    print(f"\n{title}")
    print(f"  {'':<{width}}  {'ms':>9}  {'reference':>9}  ratio [95 % interval]      A/A [95 % interval]        bound")
    for row in rows:
        print(f"  {row['name']:<{width}}  {_shown(row)}", flush=True)


def _shown(row: dict) -> str:
    if "ratio" not in row:
        figures = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())
    ratios = "  ".join(
        f"{row[kind]:6.3f} [{row[f'{name}interval'][0]:6.3f}, {row[f'{name}interval'][1]:6.3f}]"
        for kind, name in (("ratio", ""), ("again", "again_"))
    )
    if "peak_bytes" in row:
        times = f"{row['peak_bytes'] / 2**20:6.0f} MB  {row['reference_peak_bytes'] / 2**20:6.0f} MB"
    else:
        times = f"{row['seconds'] * 1e3:9.2f}  {row['reference_seconds'] * 1e3:9.2f}"
    return f"{times}  {ratios}  {verdict(row)}"


def verdict(row: dict) -> str:
    """How a row stands to its bound, in words."""
    if row.get("bound") is None:
        return "-"
    return f"{row['bound']:.2f} " + ("met" if row["met"] else "FAILS" if row["fails"] else "undecided")


def draw(results: dict, file: Path) -> Path | None:
    """Milliseconds per token against the context, a panel a shape; None where nothing was decoded."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for shape, measures in results["shapes"].items():
        for row in (row for found in measures.values() for row in found["rows"] if "series" in row):
            for kind, line in (("milliseconds_per_token", ""), ("native_milliseconds_per_token", ", native")):
                if kind in row:
                    name = row["series"] + line
                    series.setdefault(shape, {}).setdefault(name, []).append((row["tokens"], row[kind]))
    if not series:
        return None
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "manticore"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(series), figsize=(6 * len(series), 5), squeeze=False)
    for panel, (shape, lines) in zip(panels[0], series.items()):
        colours: dict[str, str] = {}
        for name, points in lines.items():
            plain = name.removesuffix(", native")
            colours.setdefault(plain, f"C{len(colours)}")
            xs, ys = zip(*sorted(points))
            style = {"linestyle": "--" if name != plain else "-", "marker": "o", "markersize": 3}
            panel.plot(xs, ys, color=colours[plain], label=name, **style)
        panel.set(title=shape, xlabel="tokens in the cache", xscale="log", yscale="log")
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("milliseconds per token")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file

"""How a plan is printed."""

from typing import TYPE_CHECKING

from .cluster import cluster_table


if TYPE_CHECKING:
    from .plan import Plan


def table(plan: "Plan") -> str:
    """The plan as lines of text."""
    lines = [f"plan of {plan.recipe}"]
    for component in plan.components:
        lines.append(
            f"  {component['name']}: {component['model_type']}, {component['layers']} layers of "
            f"{component['hidden_size']}, vocabulary {component['vocab_size']}, "
            f"{component['parameters']:,} numbers ({', '.join(component['stored_as']) or 'not yet made'})"
        )
        gated = f", gated ({component['gated']})" if component["gated"] else ""
        known = component["license"] != "unknown"
        told = f"licence {component['license']}, from {component['license_from']}" if known else "licence unknown"
        lines.append(f"      {told}{gated}")
    for b, paths in enumerate(plan.blocks):
        lines.append(f"  block {b}: {' | '.join(paths)}")
    if plan.vocabulary is not None:
        match = "one vocabulary" if plan.vocabulary.same else "vocabularies differ, rows are cut or transplanted"
        shares = [f"{share:.1%}" for share in plan.vocabulary.shared]
        lines.append(f"  {match}: {plan.vocabulary.size} rows" + (f"; shared {', '.join(shares)}" if shares else ""))
    if plan.dtype is not None:
        lines.append(f"  stream {plan.hidden_size}, {plan.dtype}, context {plan.context or 'unlimited'}")
    lines += _sizes(plan)
    if plan.building is not None:
        building = plan.building
        lines.append(
            f"  composing: {_size(building.private_bytes)} of memory at the peak, {_size(building.mapped_bytes)} "
            f"mapped from files, {_size(building.download_bytes)} to download"
        )
    for name, found in plan.cluster.items():
        lines += cluster_table(name, found)
    lines += [f"  note: {note}" for note in plan.notes]
    lines += [f"  problem: {problem}" for problem in plan.problems]
    return "\n".join(lines)


def _sizes(plan: "Plan") -> list[str]:
    rows = [("supernet", plan.supernet)]
    if plan.hybrid is not None:
        rows.append((f"hybrid {plan.choice}", plan.hybrid))
    for name, found in (("smallest", plan.smallest), ("largest", plan.largest)):
        if found is not None:
            rows.append((f"{name} hybrid {found['choice']}", found["sizes"]))
    rows = [(name, sizes) for name, sizes in rows if sizes is not None]
    if not rows:
        return []
    width = max(len(name) for name, _ in rows)
    heads = ("parameters", "weights", "cache/token", "state/sequence", "FLOPs/token", "projectors")
    lines = [f"  {'':<{width}}" + "".join(f"{head:>16}" for head in heads)]
    for name, sizes in rows:
        state = "unknown" if sizes.state_bytes_per_sequence is None else _size(sizes.state_bytes_per_sequence)
        share = sizes.projector_parameters / max(1, sizes.parameters)
        cells = (f"{sizes.parameters:,}", _size(sizes.bytes), _size(sizes.cache_bytes_per_token), state)
        cells += (f"{sizes.flops_per_token:.3g}", f"{sizes.projector_parameters:,}")
        lines.append(f"  {name:<{width}}" + "".join(f"{cell:>16}" for cell in cells) + f" ({share:.1%})")
    return lines


def _size(number: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"

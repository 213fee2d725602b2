"""What `launch.compile` says: one dictionary of plain numbers, and the tables a person reads."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from moe.plan.collectives import Collective, axes_name, collectives
from moe.plan.expected import gathered, largest, misplaced, replicated, unexpected
from moe.plan.flops import train_flops_per_token
from moe.plan.topology import Topology
from moe.train.aot import Compiled, compile_step
from moe.train.run import RunConfig

GIB = 1 << 30
KINDS = ("state", "batch", "outputs", "temporaries", "code")


def report(config: RunConfig, topology: Topology, devices: Sequence[jax.Device]) -> tuple[dict[str, Any], str]:
    """(everything that is known of the compiled step, its text)."""
    tokens = config.batch_size * config.data.seq_len
    model = tokens * train_flops_per_token(config.model, config.data.seq_len)
    found: dict[str, Any] = {
        "topology": str(topology),
        "devices": topology.num_devices,
        "mesh": config.mesh.sizes(topology.num_devices),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "seq_len": config.data.seq_len,
        "jax": jax.__version__,
        "limit_bytes": topology.chip.usable,
        "model_flops": model,
        "best_step_s": model / topology.num_devices / topology.chip.flops,
    }
    compiled = compile_step(config, devices)
    return found | measured(compiled, topology), compiled.text


def measured(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """What the compiled step holds."""
    mesh, memory = dict(compiled.mesh.shape), compiled.memory
    sent = collectives(compiled.program, mesh)
    return {
        "fits": not compiled.refused and (memory.peak or memory.total) <= topology.chip.usable,
        "refused": compiled.refused,
        "peak_bytes": memory.peak or memory.total,
        "memory": {name: getattr(memory, name) for name in (*KINDS, "host")},
        "compiler_flops_per_device": compiled.flops,
        "collectives": summed(sent, mesh),
        "unexpected": [_line(one, mesh) for one in unexpected(sent, mesh)],
        "misplaced": misplaced(compiled.executable, compiled.state, compiled.shardings),
        "replicated": replicated(compiled.state, compiled.shardings),
        "gathered": gathered(compiled.program, compiled.state, compiled.shardings),
        "largest": [
            {"array": str(array), "bytes": array.bytes, "made": times, "origin": origin}
            for array, times, origin in largest(compiled.program)
        ],
        "loops_of_unknown_length": len(compiled.program.unknown_loops),
        "lower_s": compiled.lower_s,
        "compile_s": compiled.compile_s,
        "cpu_s": compiled.cpu_s,
        "host_bytes": compiled.host_bytes,
        "hlo_bytes": len(compiled.text),
    }


def summed(sent: Sequence[Collective], mesh: dict[str, int]) -> list[dict[str, Any]]:
    """One row for every kind over every set of axes: how many a step executes, and bytes a device sends for them."""
    count: collections.Counter[tuple[str, str, int]] = collections.Counter()
    total: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for one in sent:
        if one.group > 1:
            key = (one.kind, axes_name(one.axes, mesh), one.group)
            count[key] += one.times
            total[key] += one.sent
    rows = ((*key, count[key], total[key]) for key in sorted(total, key=lambda key: -total[key]))
    return [dict(zip(("kind", "axes", "group", "times", "bytes"), row, strict=True)) for row in rows]


def show(found: dict[str, Any]) -> None:
    """Prints it."""
    console = Console()
    sizes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1 and name != "expert_data")
    print(f"{found['topology']}: {found['devices']} devices, {sizes or 'one alone'}; jax {found['jax']}")
    tokens = found["batch_size"] * found["seq_len"]
    micro = f" in {found['accumulation']} micro-batches" if found["accumulation"] > 1 else ""
    print(f"a step: {found['batch_size']:,} sequences of {found['seq_len']:,} tokens, {tokens:,} in all{micro}")
    print(
        f"model FLOPs of a step: {found['model_flops']:.4g}, at least {found['best_step_s']:.3g} s at the chips' peak"
    )
    console.print(_memory(found))
    console.print(_collectives(found))
    _findings(found)
    flops = found["compiler_flops_per_device"]
    counted = "" if flops is None else f"; it counts {flops:.4g} FLOPs a device, a loop's body once"
    print(
        f"compiled in {found['lower_s'] + found['compile_s']:.1f} s ({found['cpu_s']:.1f} s of processor) with"
        f" {found['host_bytes'] / 1e9:.2f} GB of memory to a program of {found['hlo_bytes'] / 1e6:.1f} MB{counted}"
    )
    if found["refused"]:
        print(found["refused"].strip())
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    print(f"{verdict}: {found['peak_bytes'] / GIB:.2f} GiB of {found['limit_bytes'] / GIB:.2f} GiB a device")


def _memory(found: dict[str, Any]) -> Table:
    table = Table("memory of a device", "GiB", "of the chip", title_justify="left")
    for name, size in found["memory"].items():
        if size or name in ("state", "temporaries"):
            share = "" if name == "host" else f"{size / found['limit_bytes']:.1%}"
            table.add_row(name, f"{size / GIB:.3f}", share)
    table.add_section()
    table.add_row("at most", f"{found['peak_bytes'] / GIB:.3f}", f"{found['peak_bytes'] / found['limit_bytes']:.1%}")
    return table


def _collectives(found: dict[str, Any]) -> Table:
    table = Table("sent by a device", "over", "devices", "times a step", "GB a step")
    for row in found["collectives"]:
        table.add_row(row["kind"], row["axes"], str(row["group"]), f"{row['times']:,}", f"{row['bytes'] / 1e9:.4f}")
    return table


def _findings(found: dict[str, Any]) -> None:
    for name, meaning in (
        ("unexpected", "sent, but not explained by the layout"),
        ("misplaced", "not cut as the table of axes says"),
        ("replicated", "held whole by every device"),
        ("gathered", "brought together for all layers at once"),
    ):
        for line in found[name]:
            print(f"{meaning}: {line}")
    if found["loops_of_unknown_length"]:
        print(f"{found['loops_of_unknown_length']} loops of unknown length: what they send is counted once")
    print("largest arrays of the program:")
    for row in found["largest"]:
        print(f"  {row['bytes'] / GIB:8.3f} GiB  {row['array']} made {row['made']}x  {row['origin'][-100:]}")


def _line(one: Collective, mesh: dict[str, int]) -> str:
    where = axes_name(one.axes, mesh)
    return f"{one.kind} of {one.array} over {where}, {one.sent / 1e6:.1f} MB a step, from {one.origin or 'unknown'}"

"""What `mmfast bench` says: a line for each case, tables in Markdown, and what we lose."""

from __future__ import annotations

from collections.abc import Sequence

BOLD_BELOW = 1.0  # a ratio to a peer below this is a loss


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def rate(value: float, unit: str) -> str:
    giga = value / 1e9
    if giga >= 1e4 or (giga >= 1e3 and unit == "B/s"):
        return f"{giga / 1e3:.0f} T{unit}" if giga >= 1e5 else f"{giga / 1e3:.3g} T{unit}"
    return f"{giga:.0f} G{unit}" if giga >= 100 else f"{giga:.3g} G{unit}"


def ratio(value: float, bold: bool = False) -> str:
    text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    return f"**{text}**" if bold and value < BOLD_BELOW else text


def line(row: dict) -> str:
    """One case on one line of the terminal."""
    head = f"{row['op']:11} {row['workload']:41} {row['measured']:16} {row['dtype']}"
    if "failed" in row:
        return f"{head}  WRONG, not timed: {row['failed']}"
    text = f"{head} {duration(row['seconds']['mmfast']):>8}"
    text += f" {rate(row['rate'], row['unit']):>12}" if row["rate"] and row["op"] != "call" else " " * 13
    share = row["ceiling"] and f"{row['share']:4.0%} of {row['ceiling']['name']}"
    text += f"  {share or '':26}{host(row)}"
    text += "  " + ", ".join(f"{name} {ratio(r)}" for name, r in row["ratios"].items())
    return text + (f"  (spread {row['spread']['mmfast']:.0%})" if row["spread"]["mmfast"] > 0.1 else "")


def memory_line(row: dict) -> str:
    """Peak memory of one step."""
    if "failed" in row:
        return f"peak memory, {row['name']}: failed: {row['failed']}"
    grows, tensors, peak = (row[key] / 2**20 for key in ("grows_by", "tensors", "peak"))
    return (
        f"peak memory, {row['name']}, fp32 forward + backward: grows by {grows:.0f} MiB, of which output and gradients "
        f"{tensors:.0f} MiB (the whole process: {peak:.0f} MiB)"
    )


def lost(rows: Sequence[dict]) -> list[dict]:
    """Cases slower than their best peer, the worst first."""
    timed = [row for row in rows if row.get("best_ratio") is not None]
    return sorted((row for row in timed if row["best_ratio"] < 1), key=lambda row: row["best_ratio"])


def losses(result: dict) -> list[str]:
    """The end of the report: what is wrong, what is slower than a peer, what stays far from the ceiling."""
    rows = result["cases"]
    lines = [f"WRONG, not timed: {row['name']}: {row['failed']}" for row in rows if "failed" in row]
    wrong = [f"peer not timed, {row['name']}: {name} is {why}" for row in rows for name, why in wrong_peers(row)]
    slower = lost(rows)
    lines += wrong
    lines += [f"slower than {row['best_peer']}, {ratio(row['best_ratio'])}: {row['name']}" for row in slower]
    if not slower:
        lines.append("slower than a peer: no case")
    shares = sorted((row for row in rows if row.get("ceiling")), key=lambda row: row["share"])
    lines += [f"{row['share']:.0%} of {row['ceiling']['name']}: {row['name']}" for row in shares[:5]]
    return lines + [f"measured while the machine was busy, do not trust: {name}" for name in busy(result)]


def wrong_peers(row: dict) -> list[tuple[str, str]]:
    return [(name, why) for name, why in row.get("refused", {}).items() if why.startswith("wrong: ")]


def busy(result: dict) -> list[str]:
    """Rows beside which the machine's arithmetic fell by a fifth: something else was running."""
    found = []
    for row in result["cases"]:
        ceiling = row.get("ceiling")
        if (
            ceiling
            and row["unit"] == "FLOP/s"
            and ceiling["rate"] < 0.8 * result["ceilings"][ceiling["name"]]["median"]
        ):
            found.append(row["name"])
    return found


def markdown(result: dict) -> str:
    """The whole result, to be pasted: one table for each op, losing ratios in bold."""
    where = result["machine"]
    text = [
        *([where["gpu"], ""] if result["suite"] == "cuda" else []),
        f"{where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"{where['instruction set'] or 'no compiled kernels'}; torch {result['versions']['torch']}, "
        f"mmfast {result['versions']['mmfast']}{' at ' + result['commit'] if result['commit'] else ''}, "
        f"{result['date'][:10]}; `{command(result)}`.",
        "",
        *([f"Not a whole run: {result['stopped']}.", ""] if result.get("stopped") else []),
        "Medians of interleaved rounds, two of what takes over 5 s a call. A cell: time; rate and share of the ceiling",
        "measured beside it; how many times as long each peer takes. "
        + (
            "Seconds are the device's, by events, with a cold cache and without gaps between launches."
            if result["suite"] == "cuda"
            else "Where a row does not speak of new pages, the allocator keeps and reuses memory."
        ),
    ]
    rows = result["cases"]
    for op in dict.fromkeys(row["op"] for row in rows):
        text += ["", *table(op, [row for row in rows if row["op"] == op])]
    if spread := scaling(rows):
        text += ["", *spread]
    if result["memory"]:
        text += ["", *(f"- {memory_line(row)}" for row in result["memory"])]
    text += ["", "| ceiling, as measured through the run | lowest | median | highest |", "| --- | --- | --- | --- |"]
    for name, c in result["ceilings"].items():
        text.append(f"| {name} | {' | '.join(rate(c[k], c['unit']) for k in ('low', 'median', 'high'))} |")
    text += ["", "What we lose:", "", *(f"- {entry}" for entry in losses(result))]
    if result["absent"]:
        text += ["", "Absent: " + "; ".join(f"{name} ({why})" for name, why in result["absent"].items()) + "."]
    return "\n".join(text) + "\n"


def command(result: dict) -> str:
    if "command" in result:
        return result["command"]
    only = ["--only", *(f"'{name}'" if " " in name else name for name in result["only"])] if result["only"] else []
    quick = ["--quick"] if result["quick"] else []
    suite = ["--suite", "gpu"] if result["suite"] == "cuda" else []
    return " ".join(["mmfast bench", *suite, *quick, *only, "--threads", str(result["machine"]["threads"])])


def table(op: str, rows: Sequence[dict]) -> list[str]:
    """Workloads down, dtype and what is measured across."""
    columns = list(dict.fromkeys((row["dtype"], row["measured"]) for row in rows))
    columns.sort(key=lambda c: c[0] != "fp32")
    cells = {(row["workload"], row["dtype"], row["measured"]): cell(row) for row in rows}
    heads = [f"{dtype} {measured}" for dtype, measured in columns]
    text = [f"| {op} | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        text.append(f"| {workload} | {' | '.join(cells.get((workload, *c), '') for c in columns)} |")
    return text


def cell(row: dict) -> str:
    if "failed" in row:
        return "**wrong**"
    parts = [duration(row["seconds"]["mmfast"])]
    if row["ceiling"]:
        parts.append(f"{rate(row['rate'], row['unit'])} {row['share']:.0%}")
    peers = ", ".join(f"{name} {ratio(r, bold=True)}" for name, r in row["ratios"].items())
    return "; ".join(parts + [peers] * bool(peers)) + host(row)


def host(row: dict) -> str:
    """Where the host needs longer to queue a run than the GPU to do it, that is what a single call costs."""
    queued = row.get("host_seconds", {}).get("mmfast", 0.0)
    return f"; queued in {duration(queued)}" if queued > row["seconds"]["mmfast"] else ""


def scaling(rows: Sequence[dict]) -> list[str]:
    """Time per visited cell from the smallest to the largest number of tokens."""
    text = []
    for dtype, curve in curves(rows).items():
        times = [t for _, t in curve]
        text.append(
            f"Time per visited cell and head, {dtype}: "
            + ", ".join(f"{1e12 * t:.0f} ps at {workload.split(', ')[-1]}" for workload, t in curve)
            + f"; the largest is {max(times) / min(times) - 1:.0%} above the smallest."
        )
    return text


def curves(rows: Sequence[dict]) -> dict[str, list[tuple[str, float]]]:
    """dtype -> (workload, seconds per visited cell) of the scaling cases."""
    found: dict[str, list] = {}
    for row in rows:
        if row["op"] == "scaling" and "failed" not in row:
            cells = row["work"] / (14 * 64)
            found.setdefault(row["dtype"], []).append((row["workload"], row["seconds"]["mmfast"] / cells))
    return found

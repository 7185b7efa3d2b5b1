"""Tables of server information: limits, methods and models."""

from rich.console import Console
from rich.markup import escape

from ..results.server_info import ModelInfo, Preprocessing, ServerInfo


def report_server(console: Console, server: ServerInfo, *, address: str) -> None:
    """Print the information about a server and its models."""
    console.print(f"sidelight-server {server.version} at {escape(address)}")
    _print(console, _server_facts(server))
    for model in server.models:
        version = f", version {model.version}" if model.state == "serving" else f": {model.state}"
        cause = "; the server's log has the cause" if model.state == "failed" else ""
        console.print(f"\nmodel {escape(model.name)}{version}{cause}")
        if model.state != "serving":
            continue
        _print(console, _model_facts(model))
        if model.warmup:
            _print_warmup(console, model)


def _server_facts(server: ServerInfo) -> dict[str, str]:
    limits, cancellations = server.limits, server.cancellations
    facts = {
        "methods": ", ".join(server.methods),
        "message": f"{limits.max_message_bytes / 2**20:g} MiB at most",
        "picture": f"{limits.max_image_pixels / 1e6:g} megapixels at most",
        "in flight": f"{limits.max_in_flight} batches at most, {limits.max_stream_in_flight} of them on one stream",
        "rows": f"{limits.max_example_rows} at most for one example",
    }
    if cancellations.count:
        mean_ms, longest_ms = cancellations.mean_s * 1e3, cancellations.longest_s * 1e3
        took = f"ended after {mean_ms:.0f} ms on average, {longest_ms:.0f} ms at most"
        facts["cancellations"] = f"{cancellations.count} requests cancelled while on the device {took}"
    return facts


def _model_facts(model: ModelInfo) -> dict[str, str]:
    configuration = "+".join((model.precision, *model.kernel_options))
    fixed = model.preprocessing
    return {
        "input": " × ".join(map(str, model.input_size)) if model.input_size else "any C × H × W",
        **({"pixels": _pixels(fixed)} if fixed else {}),
        "call": f"{model.call}, {model.outputs} ({model.activation})",
        "classes": str(model.class_count or "not known yet"),
        "scores": ", ".join(model.scores),
        "methods": ", ".join(model.methods),
        "runs on": f"{model.device} in {configuration}, {model.chunk_rows} rows per chunk at most",
        "guarantees": "equal bytes for equal provenance" if model.reproducible else "equal maps within a tolerance",
        "digest": model.digest,
    }


def _pixels(fixed: Preprocessing) -> str:
    mean, std = (", ".join(f"{each:g}" for each in values) for values in (fixed.mean, fixed.std))
    low, high = fixed.pixel_range
    window = "" if fixed.window is None else "; window of 16-bit and DICOM files {:g} to {:g}".format(*fixed.window)
    resize = f"short side {fixed.resize}" if fixed.resize.isdecimal() else f"resize {fixed.resize}"
    return f"{resize}, {fixed.interpolation}; {low:g} to {high:g}, mean {mean}, std {std}{window}"


def _print(console: Console, facts: dict[str, str]) -> None:
    for name, fact in facts.items():
        console.print(f"  {name:<10} {escape(fact)}")


def _print_warmup(console: Console, model: ModelInfo) -> None:
    console.print("  warm-up")
    for entry in model.warmup:
        mark = "*" if entry.chosen else " "
        rate = f"{entry.rows:>5} rows per chunk {entry.rows_per_second:>10.1f} rows/s"
        console.print(f"  {mark} {rate}  {escape(entry.configuration)}")

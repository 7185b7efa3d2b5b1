"""TorchServe's `/explanations` with a handler of Captum. Run in `.venv-torchserve`: torch, numpy, captum, torchserve.

The handler is this module's `handle`. TorchServe's own `explain_handle` has one target for a whole batch, and returns
lists for JSON, which takes several times as long; this one explains each image's own class, and returns bytes.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .http_body import body_of, drive_http, pixels_of
from .rival import arguments, free_port

if TYPE_CHECKING:
    from .saliency import Captum

MODEL_NAME = "resnet18"
MAX_BATCH_DELAY_MS = 20
_captum: "Captum | None" = None


def handle(requests: list[dict[str, bytes]] | None, context: Any) -> list[bytes] | None:
    """Explain a batch of requests. The first call has none, and loads the model."""
    global _captum
    from .saliency import Captum, load

    if _captum is None:
        _captum = Captum(load(Path(os.environ["CONTEST_FOLDER"]), threads=int(os.environ["CONTEST_THREADS"])))
    if not requests:
        return None
    answer = _captum.explain(np.stack([pixels_of(each["body"]) for each in requests]))
    return [body_of(map_, int(class_), float(p)) for map_, class_, p in zip(*answer, strict=True)]


def serve(folder: Path, *, port: int, threads: int, workers: int, batch: int) -> None:
    """Replace this process by TorchServe, with a model store and a scratch folder of its own."""
    home = folder / f"torchserve-{port}"
    about = home / "models" / MODEL_NAME / "MAR-INF" / "MANIFEST.json"
    about.parent.mkdir(parents=True)
    # TorchServe takes an archive with only one folder for a folder that contains an archive.
    (about.parent.parent / "empty").touch()
    model = {"modelName": MODEL_NAME, "modelVersion": "1.0", "handler": f"{__spec__.name}:{handle.__name__}"}
    about.write_text(json.dumps({"runtime": "python", "model": model, "archiverVersion": "0.12.0"}))
    limits = {"minWorkers": workers, "maxWorkers": workers, "batchSize": batch, "maxBatchDelay": MAX_BATCH_DELAY_MS}
    models = {MODEL_NAME: {"1.0": {"defaultVersion": True, "marName": MODEL_NAME, "responseTimeout": 120, **limits}}}
    properties = {
        "inference_address": f"http://127.0.0.1:{port}",
        "management_address": f"http://127.0.0.1:{free_port()}",
        "metrics_address": f"http://127.0.0.1:{free_port()}",
        "grpc_inference_port": free_port(),
        "grpc_management_port": free_port(),
        "load_models": MODEL_NAME,
        "models": json.dumps(models),
        "default_workers_per_model": workers,
        "disable_system_metrics": "true",
        "vmargs": "-Dlog4j2.level=ERROR",
    }
    settings = home / "config.properties"
    settings.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    environment = os.environ | {
        "CONTEST_FOLDER": str(folder),
        "CONTEST_THREADS": str(threads),
        "LOG_LOCATION": str(home),
        "METRICS_LOCATION": str(home),
        "TEMP": str(home),  # where the JVM puts its sockets
        "TMPDIR": str(home),  # and its launcher the process id
    }
    flags = ["--model-store", str(home / "models"), "--ts-config", str(settings)]
    flags += ["--start", "--foreground", "--disable-token-auth", "--no-config-snapshots"]
    os.chdir(home)
    os.execve(sys.executable, [sys.executable, "-c", "from ts.model_server import start; start()", *flags], environment)


def main() -> None:
    args = arguments(__doc__)
    if args.role == "drive":
        return drive_http(args, f"/explanations/{MODEL_NAME}")
    serve(args.folder, port=args.port, threads=args.threads, workers=args.workers, batch=args.batch)


if __name__ == "__main__":
    main()

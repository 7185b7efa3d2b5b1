"""Two models in one server, the same network exact and fast: compare their maps, then load one of them again.

python examples/two_models.py [why.png]          (needs sidelight[demo])
"""

import sys
from pathlib import Path

import numpy as np
import sidelight
import sidelight_server
import skimage

# As it would stand in sidelight.toml:
#   model = "python:sidelight_server.models.sources.demo:efficientnet_lite0"
#   allow_reload = true
#   [models.exact]
#   [models.fast]
#   fold = true
#   …
SETTINGS = {
    "model": "python:sidelight_server.models.sources.demo:efficientnet_lite0",
    "allow_reload": True,
    "models": {
        "exact": {"max_example_rows": 1_000},
        "fast": {"fold": True, "channels_last": True, "precision": "bfloat16", "max_model_in_flight": 8},
    },
}
CHELSEA = Path(skimage.__file__).parent / "data" / "chelsea.png"


def main(out: str = "why.png") -> None:
    with sidelight_server.serve(**SETTINGS) as address, sidelight.connect(address) as client:
        for model in client.info().models:
            rows_per_second = max(each.rows_per_second for each in model.warmup if each.chosen)
            ran = "+".join((model.precision, *model.kernel_options))
            print(f"{model.name}: version {model.version}, {ran}, {rows_per_second:.0f} rows/s, {model.digest[:12]}")
        method = sidelight.SmoothGrad(samples=8)
        exact, fast = (
            client.attribute(CHELSEA, model=name, method=method, score="logit") for name in ("exact", "fast")
        )
        print(f"their maps' rank correlation is {rank_correlation(exact.heatmap(0), fast.heatmap(0)):.2f}")
        sheet = sidelight.gallery(
            [exact, fast], heading="The same network, exact and fast", subtitles=["exact", "fast"]
        )
        sheet.save(out)
        again = client.reload("fast")
        print(f"{again.name}: version {again.version} serves now")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(each.ravel())) for each in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main(*sys.argv[1:])

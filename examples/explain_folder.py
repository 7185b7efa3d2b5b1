"""Stream a folder of pictures to a running server, and print and draw each answer as it comes.

python examples/explain_folder.py unix:/run/sidelight.sock pictures/ why/
"""

import sys
from pathlib import Path

import sidelight


def main(address: str, pictures: str, overlays: str) -> None:
    paths = sorted(
        path for path in Path(pictures).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    )
    Path(overlays).mkdir(parents=True, exist_ok=True)
    with sidelight.connect(address) as client:
        for answer in client.stream(paths, on_error="return"):
            path = paths[answer.index]
            if answer.error or answer.failures:
                print(f"{path.name}: {answer.error or answer.failures[0].message}")
                continue
            prediction = answer.predictions[0]
            print(f"{path.name}: {prediction.label or prediction.index} {prediction.probability:.2f}")
            answer.overlay(0).save(Path(overlays) / f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

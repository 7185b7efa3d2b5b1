"""Explain one picture by every method, side by side.

python examples/every_method.py unix:/run/sidelight.sock cat.png methods.png
"""

import sys

import sidelight

METHODS = {
    "gradient": sidelight.Gradient(),
    "gradient times input": sidelight.Gradient(times_input=True),
    "SmoothGrad": sidelight.SmoothGrad(samples=25),
    "integrated gradients": sidelight.IntegratedGradients(steps=50),
    "to a tolerance": sidelight.IntegratedGradients(tolerance=0.05),
    "SmoothGrad over IG": sidelight.SmoothGrad(samples=5, base=sidelight.IntegratedGradients(steps=10)),
    "expected gradients": sidelight.ExpectedGradients(samples=50, noise_level=0.1),
    "guided backpropagation": sidelight.GuidedBackpropagation(),
    "Grad-CAM": sidelight.GradCAM(),
    "layer gradient times activation": sidelight.LayerGradientXActivation(),
    "occlusion": sidelight.Occlusion(window=32, stride=16),
    "RISE": sidelight.RISE(masks=300),
}


def main(address: str, picture: str, out: str) -> None:
    answers, rows = [], []
    with sidelight.connect(address) as client:
        for name, method in METHODS.items():
            # RISE adds scores up: a probability begins at 0, a logit anywhere.
            score = "probability" if name == "RISE" else "logit"
            answer = client.attribute(picture, method=method, score=score, timeout=600)
            (convergence,) = answer.convergence
            answers.append(answer)
            rows.append(convergence.rows if convergence else 1)
            print(f"{name:32} {rows[-1]:4} rows {answer.timing.compute_s:7.2f} s")
    subtitles = [f"{n} row{'s' * (n > 1)}" for n in rows]
    sidelight.gallery(answers, heading="One picture, every method", titles=list(METHODS), subtitles=subtitles).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""An example of each method and of each target of the schema."""

from sidelight.v1 import attribution_pb2 as pb

METHODS = {
    "gradient": pb.GradientMethod(),
    "smoothgrad": pb.SmoothGradMethod(samples=2, noise_level=0.1),
    "integrated_gradients": pb.IntegratedGradientsMethod(steps=2),
    "expected_gradients": pb.ExpectedGradientsMethod(samples=2),
    "grad_cam": pb.GradCamMethod(),
    "layer_gradient_x_activation": pb.LayerGradientXActivationMethod(),
    "occlusion": pb.OcclusionMethod(window_height=16, window_width=16),
    "rise": pb.RiseMethod(masks=2, cells=4, keep_probability=0.5),
    "guided_backpropagation": pb.GuidedBackpropagationMethod(),
}
TARGETS = {
    "predicted": pb.PredictedTarget(),
    "index": 3,
    "label": "dog",
    "per_example": pb.PerExampleTarget(classes=[pb.ClassChoice(index=3)]),
    "top_k": pb.TopKTarget(k=2),
    "contrast": pb.ContrastTarget(positive=pb.ClassChoice(index=3), negative=pb.ClassChoice(label="dog")),
}

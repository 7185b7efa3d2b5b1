"""An answer as a pandas DataFrame with one row per example."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from .attribution import Attribution
    from .example import ExampleAttribution


def to_dataframe(answer: "Attribution") -> "pd.DataFrame":
    """Return a DataFrame with one row per example. `ImportError` if pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise ImportError("to_dataframe() needs pandas: pip install pandas") from None
    return pd.DataFrame([_row(example) for example in answer], index=pd.RangeIndex(len(answer), name="example"))


def _row(example: "ExampleAttribution") -> dict[str, Any]:
    prediction, convergence, failure = example.prediction, example.convergence, example.failure
    return {
        "name": example.name,
        "predicted_index": prediction and prediction.index,
        "predicted_label": prediction and prediction.label,
        "probability": prediction and prediction.probability,
        "is_mismatch": prediction and prediction.is_mismatch,
        "target_index": _of_targets(example, "index"),
        "target_label": _of_targets(example, "label"),
        "target_score": _of_targets(example, "score"),
        "target_against": _of_targets(example, "against"),
        "saturated": _of_targets(example, "saturated"),
        "negligible": _of_targets(example, "negligible"),
        "rows": convergence and convergence.rows,
        "error": convergence and convergence.error,
        "completeness_error": convergence and convergence.completeness_error,
        "is_met": convergence and convergence.is_met,
        "failure_code": failure and failure.code,
        "failure_message": failure and failure.message,
    }


def _of_targets(example: "ExampleAttribution", field: str) -> Any:
    """Return a field of the explained target; with a top-k target, a tuple of k."""
    target = example.target
    if isinstance(target, tuple):
        return tuple(getattr(each, field) for each in target)
    return None if target is None else getattr(target, field)

"""The trace of a guided run as a table."""

from comfy_api.latest import io

from ..dng_core.guidance import Trace
from .inputs import TRACE


class TraceTable(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGTraceTable",
            display_name="Trace Table (DNG)",
            category="DNG",
            description="Shows what guidance did at each step: the noise level, and the mean and the largest "
            "posterior and guidance scale of the images, and whether what is to be avoided was evaluated.",
            search_aliases=["dng", "trace", "posterior", "guidance scale"],
            is_output_node=True,
            inputs=[TRACE.Input("trace", tooltip="The trace of KSampler (DNG) or KSampler Advanced (DNG).")],
            outputs=[io.String.Output(display_name="table", tooltip="The table in Markdown.")],
        )

    @classmethod
    def execute(cls, trace) -> io.NodeOutput:
        table = (
            trace_table(trace)
            if trace is not None and len(trace.sigmas)
            else "Nothing was tracked: guidance was off, or the settings are a baseline's."
        )
        counts = {"evaluated": 0 if trace is None else trace.made, "spared": 0 if trace is None else trace.spared}
        return io.NodeOutput(table, ui={"text": [table], "predictions": [counts]})


def trace_table(trace: Trace) -> str:
    """One Markdown row for each step and concept."""
    lines = [
        "| step | sigma | concept | mean posterior | largest | mean scale | largest | evaluated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step, sigma in enumerate(trace.sigmas.tolist(), start=1):
        for concept in range(trace.posterior.shape[1]):
            p, scale = trace.posterior[step - 1, concept], trace.scale[step - 1, concept]
            values = (p.mean(), p.max(), scale.mean(), scale.max())
            cells = " | ".join(f"{float(value):.4g}" for value in values)
            evaluated = "yes" if trace.looked is None or bool(trace.looked[step - 1, concept]) else "no"
            lines.append(f"| {step} | {sigma:.4g} | {concept + 1} | {cells} | {evaluated} |")
    if trace.spared:
        lines += ["", f"Predictions of what to avoid: {trace.made} evaluated, {trace.spared} spared."]
    return "\n".join(lines)


NODES = [TraceTable]

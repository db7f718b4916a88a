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
            "posterior and guidance scale of the images.",
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
            else "Nothing was tracked: guidance was off, or its method is not dng."
        )
        return io.NodeOutput(table, ui={"text": [table]})


def trace_table(trace: Trace) -> str:
    """One Markdown row for each step and concept."""
    lines = [
        "| step | sigma | concept | mean posterior | largest | mean scale | largest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step, sigma in enumerate(trace.sigmas.tolist(), start=1):
        for concept in range(trace.posterior.shape[1]):
            p, scale = trace.posterior[step - 1, concept], trace.scale[step - 1, concept]
            values = (p.mean(), p.max(), scale.mean(), scale.max())
            cells = " | ".join(f"{float(value):.4g}" for value in values)
            lines.append(f"| {step} | {sigma:.4g} | {concept + 1} | {cells} |")
    return "\n".join(lines)


NODES = [TraceTable]

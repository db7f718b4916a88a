"""Where a ComfyUI sampling run meets dng_core: hooks, frames, regions, samplers, checks and the live chart."""

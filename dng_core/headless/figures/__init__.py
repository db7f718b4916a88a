"""The figures that are measured inside a ComfyUI, by workflows that this folder makes.

The ids of ComfyUI's and this pack's nodes are spelled in this folder, and nowhere else in dng_core.
"""

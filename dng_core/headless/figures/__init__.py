"""The figures that are measured inside a ComfyUI, which is asked for them by workflows made here.

The ids of ComfyUI's and this pack's nodes are spelled in this folder, and nowhere else in dng_core.
"""

"""The project's pictures, drawn with Pillow, which every ComfyUI has. The same data give the same pixels."""

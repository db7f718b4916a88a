"""The headless runner: find or install a ComfyUI, start it, run a workflow in it, fetch what it made.

ComfyUI is a program to start and a server to talk to; nothing in here imports it.
"""

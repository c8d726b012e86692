"""Engines beside their peers and beside the hardware: measurements, floors, and estimates for other GPUs.

Every subject (an engine, a diffusers peer, the ceilings) is measured in a process of its own, so that one subject's
crash, memory or settings of torch cannot touch another's figures.
"""

"""The demo: training on packaged pairs, and the pairs."""

from apo_trl.demo.run import run_demo

__all__ = ["run_demo"]

"""The demo: training on revisions of a packaged model's own answers; its prompts; CLAIR pairs written by hand."""

from apo_trl.demo.run import run_demo

__all__ = ["run_demo"]

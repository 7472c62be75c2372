"""Models asked in this process, where no server runs: a chat model that answers, a reward model that scores.

Requests and answers have the shape of OpenAI's chat completions. What a request draws depends on that request alone,
never on those that share its batch. Left out on purpose: streaming, tools, several answers to one request; ask a
server for these. Torch and transformers are imported at once, so import this module only where a model is needed.
"""

from apo_trl.pairs.llm.in_process.generator import Generator
from apo_trl.pairs.llm.in_process.reward_model import RewardModel

__all__ = ["Generator", "RewardModel"]

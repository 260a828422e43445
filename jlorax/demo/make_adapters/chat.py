"""The base model in its chat template: examples as tokens, greedy answers. torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jlorax.demo.make_adapters.tasks.example import Example

MAX_NEW_TOKENS = 48
IGNORED = -100  # torch's label for "no loss here"


class Chat:
    """The base model's folder: its tokenizer, its template, its weights in bfloat16."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def load_base(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)

    def opened(self, prompt: str) -> str:
        """The prompt in the chat template, up to where the answer begins."""
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return str(text)

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def row(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids and labels: the loss is on the answer and its end alone."""
        prompt = self.tokens(self.opened(example.prompt))
        answer = self.tokens(example.answer + self.tokenizer.eos_token)
        return prompt + answer, [IGNORED] * len(prompt) + answer

    @torch.inference_mode()
    def answer(self, model: Any, prompts: Sequence[str], batch_rows: int = 32) -> list[str]:
        """Greedy answers, in the prompts' order."""
        model.eval()
        answers: list[str] = []
        for start in range(0, len(prompts), batch_rows):
            opened = [self.opened(prompt) for prompt in prompts[start : start + batch_rows]]
            batch = self.tokenizer(
                opened, return_tensors="pt", padding=True, add_special_tokens=False
            )
            ids = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = ids[:, batch.input_ids.shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

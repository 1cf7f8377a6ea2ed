"""From what a caller gives, a text, a conversation or token ids, to the ids that a prompt runs with."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.chat import ChatTemplate, Message
from eopc_runtime.errors import PromptError
from eopc_runtime.tokenizer import Tokenizer


class Prompts:
    """Encodes prompts for one bundle; any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, context: int, vocab: int) -> None:
        """Hold the tokenizer, the most tokens of prompt plus answer, and the ids of the model."""
        self._tokenizer, self._context, self._vocab = tokenizer, context, vocab
        self._template: ChatTemplate | None = None

    def encode(
        self, prompt: str | Sequence[int] | None, messages: Sequence[Message] | None = None, raw: bool = False
    ) -> list[int]:
        """Return the ids of a prompt or conversation; token ids are checked and returned.

        Raises PromptError when it is empty, leaves no room for a new token, or the chat template refuses it.
        """
        ids = self._encode(prompt, messages, raw)
        if not ids:
            raise PromptError("the prompt is empty; give at least one token of text.")
        if len(ids) > self._context - 1:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; this bundle's context of {self._context} leaves room for "
                f"{self._context - 1} and one new token. Shorten the prompt, or build with a larger --context."
            )
        return ids

    def _encode(self, prompt: str | Sequence[int] | None, messages: Sequence[Message] | None, raw: bool) -> list[int]:
        tokenizer = self._tokenizer
        if (prompt is None) == (messages is None):
            raise PromptError("give either a prompt or messages, not both and not neither.")
        if prompt is not None and not isinstance(prompt, str):
            return self._checked(prompt)
        if messages is None:
            if not prompt:
                raise PromptError("the prompt is empty; give at least one token of text.")
            if raw or tokenizer.chat_template is None:
                return tokenizer.encode(prompt)
            messages = [{"role": "user", "content": prompt}]
        elif raw or tokenizer.chat_template is None:
            why = "raw was asked for" if raw else "this bundle has no chat template"
            raise PromptError(f"messages need a chat template, but {why}. Give a plain prompt instead.")
        if self._template is None:
            self._template = ChatTemplate(tokenizer.chat_template or "", tokenizer.special_tokens)
        # the template writes special tokens itself, so none are added here
        return tokenizer.encode(self._template.render(messages), add_special_tokens=False)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocab:
                raise PromptError(f"the prompt holds the token id {token!r}; this model knows 0 to {self._vocab - 1}.")
        return list(ids)

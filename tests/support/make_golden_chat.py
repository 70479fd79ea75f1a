"""Write the texts that transformers makes of chats by chat templates: tests/data/chat/golden.json.

    pip install transformers==5.24.0 jinja2
    python tests/support/make_golden_chat.py

The templates in tests/data/chat/*.jinja are written after the kinds that folders of the hub have, each with the
constructs that its family uses.
"""
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "data" / "chat"
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None}
SIGNS = "tags <b> & \"quotes\" 'single' \N{EURO SIGN} \N{SLIGHTLY SMILING FACE}"
TURNS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": " What is 2 + 2? "},
     {"role": "assistant", "content": "4"}, {"role": "user", "content": SIGNS}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "system", "content": "only"}, {"role": "system", "content": "twice"}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": None, "tool_calls": [
         {"type": "function", "function": {"name": "get", "arguments": {"price": "7 \N{EURO SIGN}"}}}]},
     {"role": "tool", "name": "get", "content": "{\"degrees\": 7}"}],
    [{"role": "user", "content": "think"},
     {"role": "assistant", "content": "<think>\nlong\n</think>\n\nshort", "reasoning": "long"},
     {"role": "user", "content": "more"}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is\n"}],         # to be continued
    [{"role": "user", "content": "2 + 2?"},
     {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": "exactly "}]}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": None, "reasoning": "think"}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>\nso\n</think>\nIt is "}],
]


def main():
    from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template
    found = {}
    for path in sorted(FOLDER.glob("*.jinja")):
        for number, messages in enumerate(TURNS):
            variables = {name: value for name, value in VARIABLES.items() if value is not None}
            goes_on = messages[-1]["role"] == "assistant"
            try:
                (said,), _ = render_jinja_template(
                    [_normalize_chat_messages(messages)], add_generation_prompt=not goes_on,
                    continue_final_message=goes_on, chat_template=path.read_text(encoding="utf-8"), **variables)
                result = {"text": said}
            except Exception as error:
                result = {"error": type(error).__name__}
            found[f"{path.stem}/{number}"] = result
    golden = {"variables": VARIABLES, "conversations": TURNS, "found": found}
    (FOLDER / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

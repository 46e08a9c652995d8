"""What the tests of the report read pages with."""

import json
from html.parser import HTMLParser

import tiny

HOSTILE = (
    'x </script><script>document.title="owned"</script><img src=//evil.example/a> %data% & #### 3'
)

ALPHABET = tiny.ALPHABET + "".join(sorted(set(HOSTILE) - set(tiny.ALPHABET)))


def lines():
    """Metric lines; ESS is there from step 10 on only, position 16 once."""
    for step in range(0, 30, 5):
        line = {"step": step, "loss": 2.0 / (step + 1), "time/new_seconds": 0.1 + step}
        if step >= 10:
            line |= {"weights/ess": 0.9 + step / 1000, "weights/position_0000": 0.4 + step / 100}
        if step == 25:
            line["weights/position_0016"] = 0.3
        yield line


def write_accuracy(root):
    """The results of two problem sets, one with details."""
    row = {"problems": 8, "correct": 4, "accuracy": 0.5, "low": 0.2, "high": 0.8}
    change = {"difference": 0.1, "difference_low": -0.1, "difference_high": 0.3}
    models = {"start": row | change, "sft": row, "discord": row | change}
    (root / "evaluation" / "gsm8k").mkdir(parents=True)
    result = {"baseline": "sft", "models": models}
    (root / "evaluation" / "results.json").write_text(json.dumps(result))
    details = {
        "pass_at_k": {"1": [0.5, 0.4, 0.6], "2": [0.7, 0.6, 0.8]},
        "maj_at_k": {"1": [0.5, 0.4, 0.6], "2": [0.55, 0.5, 0.6]},
        "by_difficulty": [
            {"difficulty": "Level 1", "problems": 8, "accuracy": 0.5, "low": 0.2, "high": 0.8}
        ],
    }
    models["sft"] = row | {"details": details}
    (root / "evaluation" / "gsm8k" / "results.json").write_text(json.dumps(result))


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.texts[self.open] = self.texts.get(self.open, "") + data


def data_of(text):
    return json.loads(Page(text).texts["data"])

"""Neighbours of the cases in test_trace_forms.py: other names, nestings and dialects."""

import json
import re

import pytest
from test_trace_forms import ASKED, SAID, SHARED, TALK, THOUGHT, WHOLE, reading

from dcod_jax.data import traces as reader
from dcod_jax.data.kept import Kept
from dcod_jax.data.presets import Fields
from dcod_jax.data.reasoning import Reasoning, closing, has_reasoning, opened, unfinished
from dcod_jax.errors import DcodError

USER, PLAIN_TURN, WHOLE_TURN = TALK[0], {"role": "assistant", "content": SAID}, TALK[1]
DRAFT = {"role": "assistant", "content": "No."}
BLOCK = {"type": "thinking", "thinking": THOUGHT}
ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": SAID}]},
]


def texts(records: list, **changes) -> list:
    """Prompt and completion of each trace, or why there is none."""
    found, fields, requests, answered = [], Fields(**changes), Kept(), Kept()
    for record in records:
        line = json.dumps(record).encode()
        for trace in reader._traces_of(line, fields, "x:1", requests, answered, longest=1 << 20):
            why = trace.failed or trace.unfinished or ("wrong" if trace.verdict is False else "")
            found.append(why or (trace.prompt_text(), trace.completion_text()))
    return found


CONVERSE = [{"reasoningContent": {"reasoningText": {"text": THOUGHT}}}, {"text": SAID}]
GEMINI = [{"text": THOUGHT, "thought": True}, {"text": SAID}]
RIGHT = {
    "columns that belong to the prompt": [
        {"instruction": "Add", "context": "two and three.", "response": WHOLE},
        {"Instruction": "Add", "Input": "two and three.", "Output": WHOLE},
        {"question": "Add", "context": ["two", "and three."], "response": WHOLE},
        *({"Question": "Add", name: "two and three.", "response": WHOLE}
          for name in ("Body", "passage")),
        {"Body": "Add", "Question": "two and three.", "question_concat": ASKED, "output": WHOLE},
        {"instruction": "", "input": ASKED, "output": WHOLE},
        {"problem": ASKED, "solution": WHOLE, "domain": ["Mathematics -> Algebra"],
         "final_answer": ["5 apples"], "hints": ["Count on."], "teacher": "Big R"},
        *({"problem": ASKED, "solution": WHOLE, name: value} for name, value in (
            *((name, ["Of two sums."]) for name in ("answer", "theorems", "code", "comments")),
            ("solution_is_valid", "Problem not solved"), ("llm_comment", "It is hard."),
            ("gpt_difficulty", "very hard"), ("steps", [THOUGHT, SAID]),
            ("clinical_trial", "Phase two"), ("test_samples", ["1 2", "3 4"]))),
        {"question": ASKED, "choices": {"text": ["5", "6"], "label": ["A", "B"]}, "output": WHOLE},
    ],
    "packed messages": [
        {"messages": json.dumps(TALK)},
        {"conversations": json.dumps(SHARED)},
        {"messages": {"role": ["user", "assistant"], "content": [ASKED, WHOLE]}},
        {"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:])},
        {"prompt": TALK[0], "completion": TALK[1]},
        {"prompt": ASKED, "completions": json.dumps([WHOLE])},
        {"prompt": ASKED, "completion": SAID, "reasoning": json.dumps([THOUGHT])},
        {"conversation": {"messages": TALK}},
        {"messages": [USER], "choices": json.dumps([{"message": WHOLE_TURN}])},
        {"messages": [USER], "response": json.dumps({"choices": [{"message": WHOLE_TURN}]})},
        {"messages": [USER], "completion": {"choices": [{"message": WHOLE_TURN}]}},
        {"contents": [{"parts": [{"text": ASKED}], "role": "user"},
                      {"parts": GEMINI, "role": "model"}]},
    ],
    "several completions as objects or messages": [
        {"prompt": ASKED, "completions": [{"text": WHOLE}, {"text": WHOLE}]},
        {"prompt": ASKED, "responses": [{"content": WHOLE, "model": "m"}]},
        {"prompt": ASKED, "completions": [TALK[1:], TALK[1:]]},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "reasoning": THOUGHT},
        *({"prompt": ASKED, name: [{"text": SAID, "reasoning_content": THOUGHT}]}
          for name in ("completions", "outputs", "choices")),
        {"prompt": ASKED, "completion": {"content": SAID, "reasoning": THOUGHT}},
        {"prompt": ASKED, "response": PLAIN_TURN | {"reasoning": THOUGHT}},
        {"prompt": ASKED, "completions": [{"message": PLAIN_TURN | {"thinking": THOUGHT}}]},
        *({"prompt": ASKED, name: [{"message": PLAIN_TURN, "reasoning_content": THOUGHT}]}
          for name in ("completions", "choices")),
        {"prompt": ASKED, "outputs": [{"text": SAID}], "reasoning": THOUGHT},
        {"prompt": ASKED, "text": SAID, "reasoning_content": THOUGHT,
         "meta_info": {"finish_reason": {"type": "stop"}}},
        {"messages": TALK, "choices": [{"message": WHOLE_TURN}]},  # the answer is in the log, too
        {"prompt": ASKED, "choices": [{"message": WHOLE_TURN, "delta": {"content": ""}}]},
    ],
    "reasoning with its marks": [
        *({"prompt": ASKED, "completion": SAID, "reasoning": text} for text in (
            f"<think>\n{THOUGHT}\n</think>", f"{THOUGHT}\n</think>", f"<think>{THOUGHT}",
            f"{WHOLE}")),
        {"messages": [USER, PLAIN_TURN | {"thinking": f"<think>{THOUGHT}</think>"}]},
    ],
    "reasoning in parts": [
        {"messages": [USER, PLAIN_TURN | {"reasoning_details": [
            {"type": "reasoning.text", "text": THOUGHT}]}]},
        {"messages": [USER, PLAIN_TURN | {"thinking_blocks": [BLOCK]}]},
        {"messages": [USER, PLAIN_TURN | {"thought": THOUGHT, "thinking": True}]},
        {"messages": [USER, {"role": "model", "parts": GEMINI}]},
        {"prompt": ASKED, "completion": SAID, "reasoning": {"content": THOUGHT}},
        {"messages": [USER, PLAIN_TURN | {"reasoning": {"content": THOUGHT}}]},
        {"messages": [USER, PLAIN_TURN | {"reasoning": [THOUGHT]}]},
        {"messages": [USER, {"role": "assistant", "content": [
            {"type": "reasoning", "reasoning": THOUGHT}, {"type": "text", "text": SAID}]}]},
        {"messages": [USER, {"role": "assistant", "content": CONVERSE}]},
    ],
    "answers of APIs": [
        {"request": {"messages": [USER]}, "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"messages": [USER], "response": {"choices": [{"message": WHOLE_TURN}]}},
        {"input": ASKED, "output": ITEMS, "status": "completed"},
        {"custom_id": "1", "request": {"body": {"input": ASKED}},
         "response": {"status_code": 200, "body": {"output": ITEMS}}},
        {"request": {"contents": [{"role": "user", "parts": [{"text": ASKED}]}]},
         "response": {"candidates": [{"content": {"parts": GEMINI}, "finishReason": "STOP"}]}},
        {"request": {"messages": [USER]}, "response": {"role": "assistant", "content": [
            BLOCK, {"type": "text", "text": SAID}], "stop_reason": "end_turn"}},
        {"custom_id": "1", "request": {"params": {"messages": [USER]}},
         "result": {"type": "succeeded", "message": PLAIN_TURN | {"reasoning": THOUGHT}}},
        {"messages": [USER], "message": PLAIN_TURN | {"thinking": THOUGHT}, "done": True},
        {"prompt": ASKED, "response": WHOLE, "done": True, "done_reason": "stop"},
        {"messages": [USER], "response": {"finish_reason": "COMPLETE", "message": {
            "role": "assistant", "content": [BLOCK, {"type": "text", "text": SAID}]}}},  # Cohere
        {"messages": [USER], "response": {"stopReason": "end_turn", "output": {"message": {
            "role": "assistant", "content": CONVERSE}}}},
        {"recordId": "1", "modelInput": {"messages": [USER]}, "modelOutput": {
            "role": "assistant", "content": [BLOCK, {"type": "text", "text": SAID}]}},
        {"contents": [{"parts": [{"text": ASKED}]}],
         "candidates": [{"content": {"parts": GEMINI}}]},
    ],
    "roles": [
        {"messages": [{"role": "USER ", "content": ASKED}, {"role": "ai", "content": WHOLE}]},
        *({"conversations": [SHARED[0], {"from": name, "value": WHOLE}]}
          for name in ("chatgpt", "bot", "Claude")),
    ],
    "turns of reasoning": [
        *({"messages": [USER, {"role": role, "content": THOUGHT}, PLAIN_TURN]}
          for role in ("thinking", "reasoning")),
        {"messages": [USER, PLAIN_TURN | {"content": THOUGHT, "channel": "analysis"},
                      PLAIN_TURN | {"channel": "final"}]},
    ],
    "answers of further servers": [
        {"prompt": ASKED, "content": WHOLE, "tokens_predicted": 9, "stop_type": "eos"},
        {"prompt": ASKED, "response": {"model": "m", "response": SAID, "thinking": THOUGHT}},
        {"prompt": ASKED, "response": {"thinking": THOUGHT, "text": SAID}},
        {"messages": [USER], "response": {"output": {"choices": [{"message": WHOLE_TURN}]}}},
        {"custom_id": "1", "params": {"messages": [USER]}, "result": {"type": "succeeded",
         "message": {"role": "assistant", "content": [BLOCK, {"type": "text", "text": SAID}]}}},
    ],
    "values that are none": [
        {"messages": [USER, WHOLE_TURN | {"prefix": False, "skip": 0, "channel": "general"}]},
        {"prompt": ASKED, "completion": WHOLE, **dict.fromkeys(
            ("reasoning", "answer", "system", "history", "finish_reason"), float("nan"))},
        {"prompt": ASKED, "completion": WHOLE, "error": None, "answer": ["5"]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_neighbours_of_the_cases_give_the_same_text(kind) -> None:
    for record in RIGHT[kind]:
        found = texts([record])
        assert {" ".join(prompt.split()) for prompt, _ in found} == {ASKED}, record
        assert {completion for _, completion in found} == {WHOLE}, record


@pytest.mark.parametrize(
    "turn",
    [
        *({key: value} for key in ("weight", "train", "loss") for value in (0, False, "false")),
        *({key: 0} for key in ("trainable", "train_on_turn", "loss_weight", "loss_mask")),
        {"masked": True},
        {"training": False},
    ],
)
def test_a_turn_that_is_marked_is_not_supervised(turn) -> None:
    [trace] = reading({"messages": [USER, DRAFT | turn, USER, WHOLE_TURN]})
    assert trace.supervised() == [3]


ENDED = {"prompt": ASKED, "completion": SAID}
CUT = ["FinishReason.MAX_TOKENS", "max_new_tokens", "model_context_window_exceeded", "RECITATION"]
CUT += [
    "sensitive",
    "stopped_by_user",
    "repetition",
    "out_of_tokens",
    "timeout",
    "USER_CANCEL",
    "refusal",
    "insufficient_system_resource",
    "pause_turn",
]
DROPPED = {
    "finish_reason is": [
        *(ENDED | {"finish_reason": reason} for reason in CUT),
        ENDED | {"finishReason": "length"},
        ENDED | {"done_reason": "length"},
        ENDED | {"status": "incomplete"},
        {"prompt": ASKED, "completions": [{"text": SAID, "finish_reason": "length"}]},
        {"messages": [USER, PLAIN_TURN | {"finish_reason": "length"}]},
        {"input": ASKED, "output": ITEMS, "status": "incomplete"},
        {"messages": [USER], "message": PLAIN_TURN, "done": False},
        {"messages": [USER], "response": {"candidates": [
            {"content": {"parts": GEMINI}, "finish_reason": "MAX_TOKENS"}]}},
        *(ENDED | {name: {"finish_reason": "length"}} for name in ("metadata", "details")),
        ENDED | {"metadata": '{"finish_reason": "length"}'},
        ENDED | {"stop_type": "limit"},
        ENDED | {"stop_reason": "The maximum number of tokens was reached"},
        ENDED | {"stop_reason": {"type": "abort", "message": "Abort in waiting", "code": 503}},
        {"prompt": ASKED, "completions": [SAID], "stop_reasons": ["length"]},
        ENDED | {"finish_reason": "stop", "native_finish_reason": "MAX_TOKENS"},
        {"prompt": ASKED, "completions": [{"text": SAID, "stop_reason": "max_tokens"}]},
        {"prompt": ASKED, "outputs": [{"text": SAID, "meta_info": {"finish_reason": "length"}}]},
        {"messages": [USER], "response": {"message": PLAIN_TURN, "finish_reason": "MAX_TOKENS"}},
        {"messages": [USER, PLAIN_TURN | {"response_metadata": {"finish_reason": "length"}}]},
        {"messages": [USER, PLAIN_TURN | {"finish_reason": "length"}, USER, PLAIN_TURN]},
        *({"messages": TALK, name: word} for name, word in (
            ("exit_status", "exit_cost"), ("exit_status", "submitted (exit_context)"),
            ("stop_condition", "max_turns_reached"), ("stop_condition", "prompt_too_long"),
            ("termination_reason", "max_steps"))),
        {"messages": TALK, "info": {"exit_status": "LimitsExceeded"}},
    ],
    "is (true|false)": [
        ENDED | {"truncated": True},
        ENDED | {"is_complete": "False"},
        ENDED | {"is_finished": 0},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "completed": False},
        {"prompt": ASKED, "choices": [{"message": PLAIN_TURN}], "finished": False},
        *(ENDED | {name: True} for name in ("incomplete", "is_incomplete", "was_truncated",
          "truncation", "hit_max_tokens", "max_tokens_reached", "stopped_limit", "overlong",
          "is_clipped", "partial", "aborted", "timed_out", "is_error")),
        *(ENDED | {name: False} for name in ("has_eos", "ended_with_eos", "ended")),
        {"messages": [USER, PLAIN_TURN | {"truncated": True}]},
        {"prompt": ASKED, "completions": [{"text": SAID, "truncated": True}]},
    ],
    "wrong": [
        *(ENDED | {"correct": value} for value in (0, 0.0, "false", "False")),
        ENDED | {"label": False},
        {"prompt": TALK[:1], "completion": [PLAIN_TURN], "label": False},
        {"prompt": ASKED, "outputs": [{"text": SAID}], "is_correct": [False]},
        *(ENDED | {name: word} for name, word in (
            ("correct", "incorrect"), ("correctness", "wrong"), ("passed", "fail"),
            ("verified", "unverified"), ("is_correct", "N"), ("judgement", "wrong"),
            ("r1_correctness", "False"))),
        *(ENDED | {name: True} for name in ("incorrect", "is_wrong", "wrong", "failed")),
        *(ENDED | {name: False} for name in ("kto_tag", "success", "tests_passed")),
        ENDED | {"metadata": {"is_correct": False}},
        {"prompt": ASKED, "generations": [SAID], "correct": "[False]"},
        {"messages": [USER, PLAIN_TURN | {"info": {"correct": False}}]},
        {"prompt": ASKED, "completions": [{"text": SAID, "correct": False}]},
        {"prompt": ASKED, "choices": [{"message": PLAIN_TURN, "correct": False}]},
        *(ENDED | {name: False} for name in (
            "valid", "accepted", "exact_match", "llm_judge_correct", "is_right", "rule_verify",
            "verification_passed", "unit_tests_passed", "gen_correct")),
        *(ENDED | {name: "incorrect"} for name in ("label", "judge", "result", "grade")),
        *(ENDED | {name: 0.0} for name in ("resolved", "is_success", "acc", "symbolic_correct")),
        ENDED | {"solved": "no"},
        *(ENDED | {"judgement": f"Reasoning: They differ.\n{end}"} for end in (
            "Judgement: No.", "**Final verdict:** no", "Is correct: no")),
        *({"prompt": ASKED, "responses": [SAID, "Six."], name: [wrong, wrong]} for name, wrong in (
            ("grades", "incorrect"), ("correct_list", False), ("scores", False))),
        {"messages": [USER, DRAFT | {"correct": False}, USER, WHOLE_TURN | {"correct": True}]},
    ],
    "is not ended by": [
        {"prompt": ASKED, "completion": f"Sure.\n<think>\n{THOUGHT}"},
        {"prompt": ASKED, "completion": f"{WHOLE}\n<think>again"},
        {"prompt": ASKED, "completion": f"◁think▷{THOUGHT}"},
        {"prompt": ASKED, "completion": f"{WHOLE}\n<answer>5"},
        {"messages": [USER, {"role": "assistant", "content": "<think>so"}, USER, WHOLE_TURN]},
    ],
    "the request failed|is empty|failed: ": [
        {"custom_id": "1", "response": None, "error": {"message": "rate"}},
        {"custom_id": "1", "result": {"type": "errored", "error": {"type": "overloaded"}}},
        {"prompt": ASKED, "completions": [None, "", {"text": " "}]},
        {"key": "1", "error": {"message": "rate"}},
        {"messages": [USER], "error": "rate limit"},
        {"prompt": ASKED, "completion": "Error: rate limit", "error": {"code": 429}},
        {"custom_id": "1", "params": {"messages": [USER]}, "result": {"type": "expired"}},
        {"messages": [USER], "response": {"promptFeedback": {"blockReason": "SAFETY"}}},
        {"messages": [USER], "choices": [{"message": PLAIN_TURN, "error": {"code": 502}}]},
        {"input": ASKED, "output": [{"type": "message", "content": [{"type": "refusal",
                                                                     "refusal": "No."}]}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("why", DROPPED)
def test_neighbours_of_the_cases_are_dropped(why) -> None:
    for record in DROPPED[why]:
        found = texts([record])
        assert found, record
        assert all(re.search(why, trace) for trace in found if isinstance(trace, str)), record
        assert all(isinstance(trace, str) for trace in found), record
    whole = [
        ENDED | {"finish_reason": reason} for reason in ("FinishReason.STOP", "eos", "unknown")
    ]
    whole += [ENDED | {"stop_reason": "###"}, ENDED | {"label": 0}, ENDED | {"correct": 1}]
    whole += [ENDED | {"correctness": 3}, ENDED | {"wrong": False}, ENDED | {"correct": "right"}]
    whole += [ENDED | {"reasoning": word} for word in ("minimal", "no_think")]
    whole += [ENDED | {"stats": {"correct": 0, "total": 8}}, ENDED | {"reasoning_type": "by hand"}]
    whole += [ENDED | {"exit_status": "Submitted"}, ENDED | {"termination_reason": "user_stop"}]
    whole += [ENDED | {"judgement": f"They are the same. {end}"} for end in (
        "Any errors: No", "Hallucination: no", "Correct: yes\nConfidence: 0")]  # fmt: skip
    whole += [ENDED | {"correct": "A: 0"}, ENDED | {"verified": "https://x.org:0"}]
    until = "Stop when the answer is found. Or at the time limit"
    names = ("termination_condition", "stop_condition", "exit_reason")
    whole += [ENDED | {name: until} for name in names]
    whole += [ENDED | {"score": 0.0}, ENDED | {"label": "no"}, ENDED | {"judgement": "It: yes"}]
    assert texts(whole) == [(ASKED, SAID)] * len(whole)


TEXT_PART, SEALED = [{"type": "text", "text": SAID}], [{"type": "redacted_thinking", "data": "x"}]
REFUSED = [
    (ENDED | {"cot": THOUGHT}, {}, r"prepare\.reasoning_field=cot"),
    (ENDED | {"deepseek_reasoning": [THOUGHT]}, {}, "may be the reasoning"),
    ({"messages": [USER, PLAIN_TURN | {"thinking_text": THOUGHT}]}, {}, "may be the reasoning"),
    (ENDED | {"cot": THOUGHT}, {"reasoning_field": "cott"}, "the nearest is 'cot'"),
    (ENDED | {"result": "5"}, {"answer": "results"}, "the nearest is 'result'"),
    (ENDED | {"answer": float("inf")}, {}, "found inf"),
    (ENDED | {"images": ["a.png"]}, {}, "has images, and only text can be read"),
    (ENDED | {"finish_reason": "weird"}, {}, "write stop where it did"),
    ({"prompt": ASKED, "completions": [SAID, "a"], "correct": [True]}, {}, "1 entries for 2"),
    ({"messages": [USER, DRAFT | {"mask": 1}, USER, WHOLE_TURN]}, {}, "whether the turn is trai"),
    ({"messages": [USER, DRAFT | {"train": "x"}, USER, WHOLE_TURN]}, {}, "expected 0 or 1"),
    ({"messages": [USER, {"role": "model", "parts": [{"functionCall": {}}]}]}, {}, "tool call 0"),
    ({"messages": str(TALK)}, {}, "no JSON; write it as a JSON list"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}}, {}, "different lengths"),
    ({"dialog": TALK}, {}, r"prepare\.completion_field=dialog"),
    (TALK[0], {}, r'write \{"messages": \[\.\.\.\]\}'),
    ({"prompt": ASKED, "choices": [{"delta": {"content": "a"}}]}, {}, "a streamed answer"),
    ({"messages": [USER], "response": {"words": "a"}}, {}, "the answer holds words"),
    ({"input": ASKED, "output": [*ITEMS, {"type": "web_search_call"}]}, {}, "web_search_call"),
    (ENDED | {"metadata": {"reasoning": THOUGHT}}, {}, r"reasoning_field=metadata\.reasoning"),
    (ENDED | {"metadata": {"a": 1}}, {"reasoning_field": "metadata.cot"}, "no field 'metadata.c"),
    ({"messages": [USER, PLAIN_TURN | {"info": {"think_content": THOUGHT}}]}, {}, "info.think_con"),
    (ENDED | {"reasoning": THOUGHT, "thinking": "Other."}, {}, "reasoning and thinking differ"),
    (ENDED | {"reasoning": f"<think>{THOUGHT}</think>Six."}, {}, "another answer than the compl"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "thinking"}]}]}, {}, "without"),
    ({"prompt": ASKED, "completions": ["a", "b"], "labels": [True, False]}, {}, "stepwise"),
    ({"conversations": SHARED[:1], "chosen": SHARED[1]}, {}, "completion_field=chosen"),
    ({"messages": [USER], "reasoning": THOUGHT, "answer": SAID}, {}, "form=dolphin_r1"),
    ({"prompt": TALK, "completion": "More."}, {}, "the prompt ends with an assistant message"),
    ({"messages": TALK, "chat_template_kwargs": {"xml_tools": ["f"]}}, {}, "kwargs.xml_tools"),
    (ENDED | {"image_path": "a.png"}, {}, "has image_path, and only text can be read"),
    (
        {"messages": [USER, {"role": "assistant", "content": [*TEXT_PART, BLOCK, *TEXT_PART]}]},
        {},
        "behind a part of its text",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [*SEALED, *TEXT_PART]}]},
        {},
        "encrypted cannot be trained on; prepare.reasoning=drop",
    ),
    *(
        ({"messages": [USER, {"role": "assistant", "content": [part, *TEXT_PART]}]}, {}, "encrypt")
        for part in (
            {"type": "thinking", "thinking": "", "signature": "x"},
            {"reasoningContent": {"redactedContent": "x"}},
        )
    ),
    (
        {"input": ASKED, "output": [{"type": "reasoning", "encrypted_content": "x"}, ITEMS[1]]},
        {},
        "encrypted cannot be trained on",
    ),
    ({"messages": [{"role": "system", "content": [*TEXT_PART, BLOCK]}, *TALK]}, {}, "is no answer"),
    *(({"prompt": ASKED, n: [SAID]}, {}, f"if it is {n}: ") for n in ("samples", "candidates")),
    ({"prompt": f"{ASKED}\n<think>\n", "completion": SAID}, {}, "the prompt ends with <think>"),
    (
        {"problem": ASKED, "reasoning": THOUGHT, "r1_text": SAID},
        {},
        "if it is r1_text: prepare.completion_field=r1_text",
    ),
    ({"prompt": ASKED, "generated_text": f"{ASKED} {SAID}"}, {}, "return_full_text=False"),
    ({"prompt": ASKED, "choices": [{"text": f"{ASKED} {SAID}"}]}, {}, "its whole prompt"),
    ({"messages": [USER, PLAIN_TURN | {"channel": "commentary"}, PLAIN_TURN]}, {}, "'commentary'"),
    ({"messages": [USER, DRAFT | {"role": "thinking"}]}, {}, "no answer follows it"),
    ({"messages": [USER, DRAFT | {"prefix": True}, PLAIN_TURN]}, {}, r"messages\[1\].prefix"),
    ({"messages": [USER, DRAFT | {"ignore": True}, PLAIN_TURN]}, {}, r"messages\[1\].ignore"),
    ({"prompt": ASKED, "raw_response": WHOLE}, {}, "prepare.completion_field=raw_response"),
    ({"prompt": ASKED, "content": SAID}, {}, "prepare.completion_field=content"),
    ({"system": "Be so kind.", "chat": SAID}, {}, r"found system, chat;(?! if it is system)"),
    ({"human": ASKED, "gpt": SAID}, {}, "prompt_field=human; .* prepare.completion_field=gpt"),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "name": "add", "input": {}}, *TEXT_PART],
                },
            ]
        },
        {},
        "behind a tool call",
    ),
    ({"data": [{"prompt": ASKED, "completion": SAID}]}, {}, r"jq -c '\.data'"),
    *(
        ({"problem": ASKED, "solution": "By hand, 5.", name: text}, {}, f"and {name} the teacher's")
        for name, text in (
            *(("reannotated_messages", TALK), ("code", [SAID, SAID]), ("text", WHOLE)),
            ("generate", WHOLE),
            *((name, ["It is 5."]) for name in ("samples", "rollouts", "qwen_72b", "gpt4")),
            ("talk", [USER, DRAFT | {"content": "It is 5."}]),
            *((name, SAID) for name in ("qwen_72b", "assistant_content", "prediction", "r1_text")),
        )
    ),
    ({"messages": TALK, "completions": [{"text": "Six."}]}, {}, "texts differ: messages, compl"),
    ({"prompt": ASKED, "candidates": [{"text": SAID}]}, {}, "no completion"),
    (
        {"input": {"messages": [USER]}, "preferred_output": [PLAIN_TURN]},
        {},
        "completion_field=preferred_output",
    ),
    ({"input": ASKED, "content": SAID, "repo_name": "x"}, {}, "completion_field=content"),
    ({"message_1": ASKED, "message_2": SAID}, {}, "prompt_field=message_1; .*=message_2"),
    ({"prompt": ASKED, "completion": {"final": SAID}}, {}, "completion_field=completion.final"),
    (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {},
        r"messages\[1\].content is n",
    ),
]


@pytest.mark.parametrize(("record", "changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_neighbours_of_the_cases_are_refused(record, changes, message) -> None:
    with pytest.raises(DcodError, match=message):
        texts([record], **changes)


def test_what_may_be_reasoning_is_left_out_where_reasoning_is() -> None:
    dropped = {"reasoning": Reasoning("drop")}
    assert texts([ENDED | {"cot": THOUGHT}], **dropped) == [(ASKED, SAID)]
    several = [ENDED | {"reasoning": THOUGHT, "thinking": "Other."}]
    several += [ENDED | {"completion": WHOLE, "reasoning": "Other words."}]
    several += [{"messages": [USER, PLAIN_TURN | {"reasoning": THOUGHT, "thinking": "Other."}]}]
    assert texts(several, **dropped) == [(ASKED, SAID)] * 3  # which of them is meant is no matter
    twice = {
        "prompt": ASKED,
        "completion": f"{WHOLE[: -len(SAID)]}<think>\nagain\n</think>\n{SAID}",
    }
    assert texts([twice], **dropped) == [(ASKED, SAID)]
    sealed = {"input": ASKED, "output": [{"type": "reasoning", "encrypted_content": "x"}, ITEMS[1]]}
    assert texts([sealed], **dropped) == [(ASKED, SAID)]
    assert texts([ENDED | {"cot": None}], reasoning_field="cot") == [(ASKED, SAID)]
    for name in ("gt_cot", "reference_rationale", "ground_truth_reasoning"):  # not the teacher's
        assert texts([ENDED | {name: THOUGHT}]) == [(ASKED, SAID)]


@pytest.mark.parametrize(
    "begin",
    "<THINK> <Thought> <scratchpad> <|think|> <longcat_think> <mm:think> <|begin_of_thinking|> "
    "<|inner_prefix|> <antThinking> <chain_of_thought> <cot> <|START_THOUGHT|> <start_working_out> "
    "<|thought_start|> <reflection> [THINK] ◁think▷".split(),
)
def test_marks_of_reasoning_of_any_spelling_are_known(begin) -> None:
    rest = f"\n{THOUGHT}\n{closing(begin)}\n\n{SAID}"
    assert has_reasoning(begin + rest)
    assert has_reasoning(rest)
    assert Reasoning("drop").fold(begin + rest, "") == SAID
    assert Reasoning("drop").fold(f"{SAID}\n{begin}{rest}", "") == f"{SAID}\n{SAID}"
    assert Reasoning().fold(rest, "").split() == (begin + rest).split()
    assert unfinished(f"{begin}\n{THOUGHT}") == f"{begin} is not ended by {closing(begin)}"
    assert opened(f"Hi.\n{begin}\n") == begin
    assert not opened(begin + rest)
    assert not unfinished(f"Write:\n```\n{begin}\n```\nThat is all.")


def test_marks_with_attributes_and_what_is_no_mark() -> None:
    whole = f"<think type='deep'>\n{THOUGHT}\n</think>\n\n{SAID}"
    assert Reasoning().fold(whole, "") == whole
    assert Reasoning("drop").fold(whole, "") == SAID
    for text in ("<b>x", "<think/> x", "<treatment> x", "a < thought and b > c", "[Thought] x"):
        assert not unfinished(text)
        assert not has_reasoning(text)
    for name in ("final_answer", "ANSWER", "output", "solution"):
        begun = f"{WHOLE[: -len(SAID)]}<{name}>5"
        assert unfinished(begun) == f"<{name}> is not ended by </{name}>"

"""Chat templates as Hugging Face writes them."""

import json

import pytest
import tiny_tokenizer

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError

USER = {"role": "user", "content": "Hi"}


def render(source, messages=(USER,), **how):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(list(messages), **how)


def test_messages_and_generation_prompt():
    template = ChatTemplate(tiny_tokenizer.CHAT_TEMPLATE)
    assert template.render([USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([USER], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_special_tokens_and_variables_are_names_in_the_template():
    assert render("{{ bos_token }}{{ mode }}", variables={"mode": "x", "self": 1}) == "<s>x"


def test_blocks_leave_no_blank_lines():
    assert render("{% if true %}\n  {% if true %}\na\n  {% endif %}\n{% endif %}\n") == "a\n"


def test_tojson_is_plain_json():
    names = {"things": [{"name": "f", "about": "<é>"}]}
    assert render("{{ things | tojson }}", variables=names) == '[{"name": "f", "about": "<é>"}]'
    assert json.loads(render("{{ things | tojson(indent=2) }}", variables=names)) == names["things"]


def test_loop_controls_and_generation_blocks_are_understood():
    source = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "13"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"


def test_strftime_now_formats_today():
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_raise_exception_is_the_callers_error():
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{{ messages[0].content.x.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}"])
def test_template_that_fails_on_messages_is_the_callers_error(source):
    with pytest.raises(ChatTemplateError):
        render(source)


def test_sandbox_keeps_templates_from_python():
    with pytest.raises(ChatTemplateError):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")


def test_template_that_is_not_jinja_is_refused():
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{% if %}")


def test_text_parts_are_joined_for_templates_of_strings():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0]['content'] }}", [{"role": "user", "content": parts}]) == "a b"


def test_templates_that_loop_over_content_get_parts():
    source = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(source, [{"role": "user", "content": parts}]) == "[a][b]"
    assert render(source) == "[Hi]"


def test_template_that_tests_for_strings_keeps_them():
    source = (
        "{% if messages[0].content is string %}{{ messages[0].content }}"
        "{% else %}{% for p in message.content %}{% endfor %}{% endif %}"
    )
    assert render(source) == "Hi"


def test_final_message_is_left_open():
    messages = [USER, {"role": "assistant", "content": "It is "}]
    template = ChatTemplate(tiny_tokenizer.CHAT_TEMPLATE)
    text = template.render(messages, continue_final_message=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nIt is "


def test_final_message_that_the_template_strips_is_left_open_at_its_last_word():
    source = "{% for m in messages %}{{ m.content | trim }}<end>{% endfor %}"
    messages = [USER, {"role": "assistant", "content": " It is "}]
    assert render(source, messages, continue_final_message=True) == "Hi<end>It is"


@pytest.mark.parametrize(
    "final", ["The answer is ", "<", "end", [{"type": "text", "text": "It"}, {"type": "text", "text": "is"}]]
)
def test_final_message_is_found_though_its_text_is_elsewhere_too(final):
    """In an earlier message, or in the marker behind it."""
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    messages = [{"role": "user", "content": "Begin with 'The answer is ' please."}, {"role": "assistant"}]
    messages[1]["content"] = final
    want = "It is" if isinstance(final, list) else final.strip()
    text = render(source, messages, continue_final_message=True)
    assert text == f"<user>Begin with 'The answer is ' please.<end><assistant>{want}"


def test_final_message_that_the_template_leaves_out_cannot_be_continued():
    with pytest.raises(ChatTemplateError, match="changes the final message"):
        render(
            "{{ messages[0].content }}",
            [USER, {"role": "assistant", "content": "x"}],
            continue_final_message=True,
        )


def test_parts_of_a_final_message_are_continued_in_the_last_text():
    source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "It"}, {"type": "text", "text": "is"}]
    assert render(source, [{"role": "assistant", "content": parts}], continue_final_message=True) == "[It][is"


def test_empty_final_message_cannot_be_continued():
    with pytest.raises(ChatTemplateError, match="continue_final_message"):
        render(
            "{{ messages[1].content }}",
            [USER, {"role": "assistant", "content": " "}],
            continue_final_message=True,
        )


def test_arguments_of_tool_calls_are_objects():
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    source = "{{ messages[0].tool_calls[0].function.arguments.x }}"
    assert render(source, [{"role": "assistant", "content": "", "tool_calls": [call]}]) == "1"


def test_template_is_found_in_the_config_or_its_own_file(tmp_path):
    assert ChatTemplate.from_dir(tiny_tokenizer.write(tmp_path)) is None
    tiny_tokenizer.write(tmp_path, chat_template="config {{ messages[0].content }}")
    assert ChatTemplate.from_dir(tmp_path).render([USER]) == "config Hi"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert ChatTemplate.from_dir(tmp_path).render([USER]) == "file Hi"
    (tmp_path / "mine").write_text("mine")
    assert ChatTemplate.from_dir(tmp_path, tmp_path / "mine").render([USER]) == "mine"
    with pytest.raises(ChatTemplateError, match="chat_template="):
        ChatTemplate.from_dir(tmp_path, tmp_path / "absent")


def test_of_named_templates_the_default_is_used(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = ChatTemplate.from_dir(tiny_tokenizer.write(tmp_path, chat_template=named))
    assert template.render([USER]) == "plain"


def test_fields_that_are_null_are_left_out_as_templates_ask_whether_they_are_there():
    """What the official client sends back of an answer without calls."""
    template = ChatTemplate(
        "{% if 'tool_calls' in messages[0] %}{{ messages[0].tool_calls | length }}{% endif %}"
    )
    for calls in (None, []):
        assert template.render([{"role": "assistant", "content": "a", "tool_calls": calls}]) == ""
    assert (
        ChatTemplate("{{ messages[0].content is none }}").render([{"role": "x", "content": None}]) == "True"
    )


@pytest.mark.parametrize("template", ["{{ '' + call.arguments }}", "{{ call.arguments | tojson }}"])
def test_arguments_of_a_call_are_text_where_the_template_joins_them_to_its_own(template):
    source = "{% set call = messages[0].tool_calls[0].function %}" + template
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert ChatTemplate(source).render([message]) == '{"a": 1}'

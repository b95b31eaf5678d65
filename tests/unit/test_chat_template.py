"""Chat templates: what models ship, and what a hostile file could ship."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from hotcold.formats.chat_template import CHATML, ChatTemplate, load_template
from hotcold.formats.errors import FormatError, ParameterError, TemplateError

HELLO = [{"role": "user", "content": "hello"}]
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi <b> & \"q\" 'é'"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
]


def render(source: str, messages: list[dict[str, Any]] = HELLO, **extra: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **extra)


def test_chatml() -> None:
    assert ChatTemplate(CHATML).render(TALK[:2]) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi <b> & \"q\" 'é'<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not ChatTemplate(CHATML).render(TALK, add_generation_prompt=False).endswith("assistant\n")
    assert "None" not in ChatTemplate(CHATML).render([{"role": "assistant", "content": None}])


def test_llama2_style() -> None:
    source = """{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}
    {% set rest = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {%- else %}
{{ ' ' ~ message.content | trim ~ ' ' ~ eos_token }}
    {%- endif %}
{% endfor %}"""
    assert render(source, TALK) == (
        "<s>[INST] <<SYS>>be kind<</SYS>>hi <b> & \"q\" 'é' [/INST] yes </s><s>[INST] more [/INST]"
    )
    with pytest.raises(TemplateError, match="roles must alternate"):
        render(source, [TALK[2]])


def test_tools_and_namespace() -> None:
    source = (
        "{%- set ns = namespace(found=false, names=[]) %}{%- for tool in tools or [] %}"
        "{%- set ns.names = ns.names + [tool.function.name] %}"
        "{%- set ns.found = true %}{{- tool | tojson }}\n"
        "{%- if loop.last %}{% break %}{% endif %}{%- endfor %}{{ ns.names | join(', ') }} {{ ns.found }}"
    )
    tools = [{"function": {"name": name, "description": "<é> & 'x'"}} for name in ("one", "two")]
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    assert render(source, tools=tools) == lines.replace("\n", "") + "one, two True"
    assert render(source) == " False"


def test_features() -> None:
    assert render("{{ messages | tojson }}", [{"role": "a", "content": "<"}]) == '[{"role": "a", "content": "<"}]'
    assert render("{{ {'b': [1]} | tojson(indent=2) }}") == '{\n  "b": [\n    1\n  ]\n}'
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert (
        render("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{{ loop.length }}{% endfor %}")
        == "05253545"
    )
    assert (
        render("{% for i in [1, 2] %}{{ loop.revindex }}{{ loop.previtem }}{{ loop.nextitem }};{% else %}x{% endfor %}")
        == "22;11;"
    )
    assert render("{% for i in [] %}a{% else %}b{% endfor %}") == "b"
    assert render("{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}") == "x=1"
    tree = "{% for n in tree recursive %}{{ n.v }}({{ loop(n.c) }}){% endfor %}"
    assert render(tree, tree=[{"v": 1, "c": [{"v": 2, "c": []}]}]) == "1(2())"
    assert (
        render("{% macro m(x, y='z') %}<{{ x }}{{ y }}{{ caller() }}>{% endmacro %}{% call m(1) %}c{% endcall %}")
        == "<1zc>"
    )
    assert render("{{ 'a-b-c'.split('-')[-1] }}{{ 'abc'[::-1] }}{{ 'a b' | replace('a', 'c') | title }}") == "ccbaC B"
    assert render("{{ 'x\ny' | indent(2) }}|{{ ['a', 'b'] | map('upper') | join('-') }}") == "x\n  y|A-B"
    assert render("{{ '%s is %d' % ('a', 3) }} {{ '{:>4}|{}'.format('b', 10) }}") == "a is 3    b|10"
    assert render("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}") == "1"
    assert render("{{ [1, 2] | sum }}{{ '7' | int + 1 }}{{ 2 ** 10 }}{{ 7 // 2 }}") == "3810243"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{{ enable_thinking }}{{ bos_token }}", enable_thinking=True) == "True<s>"
    assert render("a\n{# comment #}\n    {% if true %}\nb\n    {% endif %}\nc") == "a\nb\nc"


LEAVING = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ (''|attr('__class__')).__name__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | first | attr('format') }}{{ ''.__class__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ (messages | map('attr', '__class__') | list)[0].__name__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ lipsum() }}",
    "{{ open('/etc/passwd').read() }}",
]


@pytest.mark.parametrize("source", LEAVING)
def test_no_way_out(source: str) -> None:
    messages = [dict(message) for message in TALK]
    with pytest.raises(TemplateError) as caught:
        render(source, messages)
    assert "\n" not in str(caught.value)
    assert messages == TALK


DOUBLE = "{% set ns = namespace(x=%s) %}{% for i in range(200) %}{% set ns.x = %s %}{% endfor %}"
GROWING = [
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) if j > i %}{{ j }}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set r = range(99) | list %}{% for a in r recursive %}{{ loop(r) if loop.depth < 9 }}{% endfor %}",
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "ns.x ~ ns.x"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "ns.x + ns.x"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "ns.x.replace('a', ns.x)"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "ns.x | replace('a', ns.x)"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "[ns.x, ns.x] | join"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "''.join([ns.x, ns.x])"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "'%s%s' % (ns.x, ns.x)").replace("'%s%s'", "'%s' '%s'"),
    DOUBLE.replace("%s", "'abcdefgh'", 1).replace("%s", "'{0}{0}'.format(ns.x)"),
    DOUBLE.replace("%s", "'a\na'", 1).replace("%s", "ns.x | indent(ns.x)"),
    DOUBLE.replace("%s", "[1]", 1).replace("%s", "ns.x + ns.x"),
    DOUBLE.replace("%s", "[1]", 1).replace("%s", "[ns.x, ns.x]") + "{{ ns.x }}",
    DOUBLE.replace("%s", "[1]", 1).replace("%s", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    DOUBLE.replace("%s", "[1]", 1).replace("%s", "[ns.x, ns.x]") + "{{ ns.x | string | length }}",
    DOUBLE.replace("%s", "9", 1).replace("%s", "ns.x * ns.x"),
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * [0] }}",
    "{{ 9 ** 999999999 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1 | round(1000000000, 'ceil') }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ [[[1] * 9999] * 9999] | sum(start=[]) }}",
    "{% macro m() %}" + "x" * 9999 + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "{{ strftime_now('%999999999d') }}",
]


@pytest.mark.parametrize("source", GROWING)
def test_bounded(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{",
        "{% for %}",
        "{% endif %}",
        "{{ x | nosuchfilter }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ [1][5] + 1 }}",
        "{{ raise_exception('a\nb') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
        "x" * ((1 << 20) + 1),
    ],
    ids=lambda source: source[:30],
)
def test_failures_are_one_line(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_long_talk_is_no_attack() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(2000)]
    source = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' + (m.content | trim) }}{% if loop.index0 == ns.last %}!{% endif %}"
        "{% if loop.index0 == messages | length - 1 %}.{% endif %}{% endfor %}"
    )
    text = render(source, messages)
    assert text.count("<|user|>") == 1000 and text.count("!") == 1 and text.endswith(".")


@pytest.mark.parametrize("messages", ["hello", None, 3, [1], [{}], [{"role": 1}], ["user"]])
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(ParameterError):
        ChatTemplate(CHATML).render(messages)


def test_load() -> None:
    keys = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    template = load_template(SimpleNamespace(metadata=keys))
    assert template.render(HELLO) == "<s>hello</s>"
    assert not template.is_fallback and template.stop_strings == ()
    keys["tokenizer.ggml.eos_token_id"] = 7
    assert load_template(SimpleNamespace(metadata=keys)).render(HELLO) == "<s>hello"
    with pytest.raises(FormatError, match="chat_template"):
        load_template(SimpleNamespace(metadata={"tokenizer.chat_template": 3}))


def test_fallback() -> None:
    with pytest.warns(UserWarning, match="ChatML") as record:
        template = load_template(SimpleNamespace(metadata={}, path="m.gguf"))
    assert len(record) == 1 and "m.gguf" in str(record[0].message)
    assert template.is_fallback and template.stop_strings == ("<|im_end|>",)
    assert template.render(HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"

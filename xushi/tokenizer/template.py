"""The chat form as a Jinja template, for programs that read an export.

Not here: the same form in token ids, which `chat` makes; the tests compare both.
"""

import re

# DeepSeek-V3.1's model card, section "ToolCall". The example of a call comes between the two texts
# of TOOLS_RULES.
TOOLS_HEAD = "## Tools\nYou have access to the following tools:\n"
TOOLS_RULES = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n",
    "\n\nWhere:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
    "Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces",
)

_EXAMPLE = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
    "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
)

_TEMPLATE = """\
{{- bos_token -}}
{%- set state = namespace(system=[], last_user=-1, uses_tools=false, after_tool=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set state.system = state.system + [message['content']] -%}
{%- elif message['role'] == 'user' -%}
{%- set state.last_user = loop.index0 -%}
{%- elif message['role'] == 'tool' or message.get('tool_calls') -%}
{%- set state.uses_tools = true -%}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{%- set state.uses_tools = true -%}
{%- set described = namespace(text=HEAD) -%}
{%- for tool in tools -%}
{%- set described.text = described.text + '\\n### ' + tool['function']['name'] -%}
{%- set described.text = described.text + '\\nDescription: ' + tool['function']['description'] -%}
{%- set schema = tool['function']['parameters'] | tojson -%}
{%- set described.text = described.text + '\\n\\nParameters: ' + schema + '\\n' -%}
{%- endfor -%}
{%- set state.system = state.system + [described.text + RULES] -%}
{%- endif -%}
{%- if state.uses_tools and not HAS_TOOL_TOKENS -%}
{{- raise_exception('the vocabulary has no tool tokens') -}}
{%- endif -%}
{{- state.system | join('\\n\\n') -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- elif message['role'] == 'assistant' -%}
{%- if not state.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
{%- if message.get('reasoning_content') is not none and loop.index0 > state.last_user -%}
{{- '<think>' + message['reasoning_content'] -}}
{%- endif -%}
{{- '</think>' + (message['content'] or '') -}}
{%- if message.get('tool_calls') -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' -}}
{{- call['function']['arguments'] + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{%- if message['role'] != 'system' -%}
{%- set state.after_tool = message['role'] == 'tool' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""


def chat_template(tools: bool) -> str:
    """The template for a vocabulary with or without tool tokens; without them it refuses tools."""
    texts = {
        "HEAD": _literal(TOOLS_HEAD),
        "RULES": _literal(TOOLS_RULES[0] + _EXAMPLE + TOOLS_RULES[1]),
        "HAS_TOOL_TOKENS": str(tools).lower(),
    }
    return re.sub("|".join(texts), lambda match: texts[match[0]], _TEMPLATE)


def _literal(text: str) -> str:
    """A text as a string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"

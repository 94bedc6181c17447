"""The chat form as a Jinja template, for programs that read an export.

Not here: the same form in token ids, which `chat` makes; the tests compare both.
"""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set system = namespace(parts=[]) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set system.parts = system.parts + [message['content']] -%}
{%- endfor -%}
{{- system.parts | join('\\n\\n') -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' -}}
{%- if message.get('reasoning_content') -%}{{- '<think>' + message['reasoning_content'] -}}{%- endif -%}
{{- '</think>' + message['content'] + eos_token -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

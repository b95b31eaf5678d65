"""What requests look like: pydantic models, which check bodies and document them; unknown fields pass."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..fields import LONGEST_NAME, MOST_TOOLS, REFUSED
from ..fields import MOST_CHOICES as MAX_N
from ..fields import MOST_STOPS as MAX_STOPS

MAX_INPUTS = 2048  # texts in one request for embeddings, as OpenAI has it
MAX_BIASES = 4096
MAX_TURNS = 10_000


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:  # before each of them is checked, and complained of
        raise ValueError(f"got {len(biases)} entries, wanted at most {MAX_BIASES}")
    return biases



Text = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
# fail_fast: the first wrong item ends the check, so a list of a million wrong ones costs no million errors
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Inputs = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-1000, le=1000)]],
    BeforeValidator(_few),
    Field(max_length=MAX_BIASES),
]
JSONObject = dict[str, Any]


def _not_a_number(value: object) -> object:
    """0, which Literal[False] would take for False."""
    if value == 0 and value is not False:
        raise ValueError("Input should be false")
    return value


class Schema(BaseModel):
    """Strict (no "5" for 5), and tolerant of fields that other servers know."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=(), hide_input_in_errors=True)


class Sampling(Schema):
    """What chat and text completions share."""

    refused: ClassVar[tuple[str, ...]] = REFUSED  # passed on all the same: the library says why not
    model: str | None = Field(None, description="One of /v1/models; where only one is served, any name will do.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    logit_bias: Biases | None = Field(None, description="Token id (as text) -> what is added to its score.")
    seed: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    stop: Text | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    grammar: str | None = Field(None, description="What the answer must follow, in GBNF or Lark; regex: likewise.")
    regex: str | None = None
    user: str | None = None


class StreamOptions(Schema):
    """What a stream says besides the answer."""

    include_usage: bool | None = None


class Part(Schema):
    """A part of a message; text is what is supported."""

    type: str
    text: str | None = None


class FunctionCall(Schema):
    """A function that the model called; arguments is JSON as text."""

    name: Text
    arguments: str


class ToolCall(Schema):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Schema):
    """One turn of a conversation."""

    role: Text
    content: str | Annotated[list[Part], Field(max_length=MAX_TURNS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Schema):
    """A function that the model may call; parameters is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool; functions are the one kind that is supported."""

    type: Literal["function"]
    function: Function


class ToolName(Schema):
    """The name of a function."""

    name: Text


class ToolChoice(Schema):
    """The function that must be called."""

    type: Literal["function"]
    function: ToolName


class JSONSchema(Schema):
    """A JSON schema and its name."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=(), populate_by_name=True)
    name: Text
    schema_: JSONObject = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Schema):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Schema):
    """Any JSON object, or one of a schema."""

    type: Literal["json_object"]
    schema_: JSONObject | None = Field(None, alias="schema")


class SchemaFormat(Schema):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Choice = Literal["none", "auto", "required"]


class ChatRequest(Sampling):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampling):
    """A prompt to be continued, or several."""

    prompt: str | Texts | Tokens | TokenLists
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


class EmbeddingRequest(Schema):
    """Texts, or texts as token ids, to be embedded."""

    input: Text | Inputs | Tokens | TokenLists
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="None but the model's own.")
    user: str | None = None


class ResponsesTool(Schema):
    """A function, in the flat form of /v1/responses."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class ResponsesToolChoice(Schema):
    """The function that must be called, in the flat form."""

    type: Literal["function"]
    name: Text


class FlatSchemaFormat(JSONSchema):
    """JSON of a schema, in the flat form."""

    type: Literal["json_schema"]


class ResponsesText(Schema):
    """What the text looks like."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class Item(Schema):
    """A message (role, content), a function_call, or a function_call_output."""

    type: str | None = None
    role: Text | None = None
    content: str | Annotated[list[Part], Field(max_length=MAX_TURNS, fail_fast=True)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], Field(max_length=MAX_TURNS, fail_fast=True)] | None = None


class ResponsesRequest(Schema):
    """A conversation to be answered, for /v1/responses; nothing is kept between requests."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    metadata: JSONObject | None = None
    previous_response_id: None = Field(None, description="Not supported: send the whole conversation as input.")
    conversation: None = Field(None, description="Not supported, likewise.")
    background: Annotated[Literal[False], BeforeValidator(_not_a_number)] | None = None


class TokenizeRequest(Schema):
    """A text to be cut into tokens."""

    content: str
    add_special: bool = Field(False, description="With BOS, where the model wants one.")
    parse_special: bool = Field(True, description="Control tokens in the text count as such.")
    with_pieces: bool = Field(False, description="Give each token's text (or bytes, where it is no text), too.")
    model: str | None = None


class DetokenizeRequest(Schema):
    """Tokens to be put together."""

    tokens: Annotated[list[Token], Field(fail_fast=True)]
    model: str | None = None


Sampling.model_rebuild()

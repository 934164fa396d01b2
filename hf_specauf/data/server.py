"""Answers written by an OpenAI-compatible server of the target (vLLM, SGLang, TGI, ...)."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from datasets import Dataset

from .conversation import Answer, Conversation, Sampling, unwatched
from .findings import ended_itself

RETRIES = 5
PATIENCE = 2.0  # seconds before the second try, doubled for each further one
TIMEOUT = 3600  # seconds: a long answer of a busy server takes its time
THIS_QUESTION = (400, 413, 422)  # the server refuses this question, and answers others
EVERY_QUESTION = (401, 403, 404)  # the address, the model's name or the key is wrong

# Keys of sampling with the values that change nothing. vLLM and SGLang fill those that a request
# leaves out from the model's generation_config (vllm#15281), and llama.cpp from values of its own.
NEUTRAL = {
    "top_k": -1,  # 0 means it too, but SGLang and older vLLM refuse it
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def check_endpoint(endpoint: str) -> None:
    """Raise where an endpoint is no address that anybody could be asked at.

    Raises:
        ValueError: what it must look like.
    """
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    is_address = url.scheme in ("http", "https") and url.host and (url.port or 1) < 2**16
    if not is_address or endpoint.split() != [endpoint]:
        raise ValueError(
            f"endpoint is {endpoint!r}, which is no address; it must be one like"
            " http://localhost:8000/v1, with http:// or https:// before it and up to /v1"
        )


NEEDS_TARGET = (
    "is plain text, which is continued token by token, and that needs the target itself: leave out"
    " --endpoint, or such rows"
)


def refuse_plain_text(rows: Dataset) -> None:
    """Raise where a row is plain text, before any server is asked."""
    if "text" not in rows.column_names:
        return
    # A file of several formats has the columns of all.
    for number, row in enumerate(rows):
        if Conversation(number, row).text is not None:
            raise ValueError(f"row {number} {NEEDS_TARGET}")


# `huggingface_hub.InferenceClient(base_url=...)` would not do instead. Without a key it sends the
# user's Hub token to the server, a failed request is not tried again, and where HF_HUB_OFFLINE is
# set it asks nobody, not even a server on this machine.
class ServerWriter:
    """Writes the next answer of conversations by a server. Its key is `OPENAI_API_KEY`, never a Hub
    token.

    Args:
        endpoint (`str`): its address, up to `/v1`.
        model (`str`): the name that the target goes by there.
        chat_template_kwargs (`dict`, *optional*): for the chat template of the prompts.
        concurrency (`int`): requests at a time.
        end (`tuple[int, str]`, *optional*): a token to stop at that the server does not know of, as
            id and text.

    Attributes:
        neutral (`dict`): the keys of sampling that are sent so that the server's own defaults do
            not decide them.
        ending (`dict`): the keys that tell it `end`.
    """

    engine = "endpoint"

    def __init__(
        self,
        endpoint: str,
        model: str,
        sampling: Sampling,
        *,
        chat_template_kwargs: dict | None,
        concurrency: int,
        end: tuple[int, str] | None = None,
    ):
        self.endpoint = endpoint
        # The address of the questions themselves is easily copied instead.
        self.url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.concurrency = concurrency
        self.answered = unwatched
        # A key that was read from a file may end in a line feed, which no header may hold.
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(timeout=TIMEOUT, headers=headers)
        self.settings = {
            "model": model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        self.neutral = dict(NEUTRAL)
        # These two are no keys of OpenAI's. A server that knows only those would refuse them, and
        # the user wants them.
        if sampling.top_k:
            self.settings["top_k"] = sampling.top_k
            del self.neutral["top_k"]
        if chat_template_kwargs:
            self.settings["chat_template_kwargs"] = chat_template_kwargs
        self.ending = {}
        if end is not None:
            # Ids are vLLM's and SGLang's. Their `stop` does not see special tokens, others' does.
            self.ending = {"stop_token_ids": [end[0]], "stop": [end[1]]}

    def learn(self) -> dict:
        """Try the keys that the user did not give on a question of one token, and leave out those
        that the server refuses.

        Returns:
            what of it belongs to the settings.

        Raises:
            OSError: the server cannot help.
        """
        added = self.neutral | self.ending
        # Where even the plain question is refused, the keys are not why.
        if not self._takes(added) and self._takes({}):
            taken = {key: value for key, value in added.items() if self._takes({key: value})}
            refused = [key for key in self.neutral if key not in taken]
            if refused:
                print(
                    f"the endpoint {self.endpoint} refuses {', '.join(refused)}: its own defaults"
                    " decide these (vLLM's are off with `--generation-config vllm`)"
                )
            if self.ending and taken.keys().isdisjoint(self.ending):
                print(
                    f"the endpoint {self.endpoint} refuses {' and '.join(self.ending)}: answers go"
                    " on past the chat's end, unless it knows that. Add the token to eos_token_id"
                    " in the generation_config.json that it reads"
                )
            self.neutral = {key: self.neutral[key] for key in self.neutral if key in taken}
            self.ending = {key: self.ending[key] for key in self.ending if key in taken}
        found = {"neutral_sampling": [*self.neutral]}
        if self.ending:
            found["stops_at"] = self.ending
        return found

    def leave_to_server(self) -> None:
        """Send no neutral keys, for answers that were begun without."""
        print(
            f"these answers were begun with {', '.join(self.neutral)} left to the endpoint's own"
            " defaults, and go on so: give another --out for answers that are sampled without them"
        )
        self.neutral, self.ending = {}, {}

    def _takes(self, keys: dict) -> bool:
        """Whether the server answers a question with these keys."""
        asked = {"messages": [{"role": "user", "content": "Hi"}], "seed": 0, "max_tokens": 1}
        reply = self._post(self.settings | asked | keys)
        if reply.status_code in THIS_QUESTION:
            return False
        self._read(reply)
        return True

    def __call__(self, conversations: list[Conversation], seed: int) -> list[Answer]:
        """An answer to the last question of each conversation, each with a seed of its own."""
        # With one seed for all, a question asked twice would be answered twice in the same words.
        seeds = range(seed, seed + len(conversations))
        answers = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            for answer in pool.map(self._ask, conversations, seeds):
                answers.append(answer)
                self.answered(len(answers), len(conversations))
        return answers

    def _ask(self, conversation: Conversation, seed: int) -> Answer:
        """The next answer of one conversation.

        Raises:
            ValueError: it is plain text.
            OSError: the server cannot help.
        """
        if conversation.text is not None:
            raise ValueError(f"row {conversation.source_row} {NEEDS_TARGET}")
        body = self.settings | self.neutral | self.ending
        body |= {"messages": conversation.history, "seed": seed}
        if conversation.tools:
            body["tools"] = conversation.tools
        reply = self._post(body)
        if reply.status_code in THIS_QUESTION:
            return Answer(skipped=f"the endpoint refused it ({in_short(reply)})")
        return self._read(reply)

    def _post(self, body: dict) -> httpx2.Response:
        """The reply to one request: an answer, or a refusal of this question. Anything else is
        tried again after a pause.

        Raises:
            OSError: the server refuses every question, or failed at each try.
        """
        for attempt in range(RETRIES):
            # A server that starts or is busy needs a while, and no pause follows the last try.
            if attempt > 0:
                time.sleep(PATIENCE * 2 ** (attempt - 1))
            try:
                reply = self.client.post(self.url, json=body)
            except httpx2.HTTPError as error:  # no connection, or it broke off
                if "Name or service not known" in str(error):
                    raise OSError(
                        f"the endpoint {self.endpoint} is at a host that nobody knows ({error}):"
                        " check its address. What was answered is kept"
                    ) from error
                said = " ".join(str(error).split())
                continue
            said = in_short(reply)
            if reply.status_code == 200 or reply.status_code in THIS_QUESTION:
                return reply
            if reply.status_code in EVERY_QUESTION:
                raise OSError(
                    f"the endpoint {self.endpoint} refuses every question ({said}): check its"
                    " address, the model's name (--target) and OPENAI_API_KEY. What was answered"
                    " is kept"
                )
        raise OSError(
            f"the endpoint {self.endpoint} failed {RETRIES} times ({said}). What was answered"
            " is kept: start the same command again when it is back"
        )

    def _read(self, reply: httpx2.Response) -> Answer:
        """The answer in a reply.

        Raises:
            OSError: there is none, because the server speaks another language.
        """
        try:
            choice = reply.json()["choices"][0]
            message = choice["message"]
            truncated = not ended_itself(choice["finish_reason"])
        except (ValueError, LookupError, TypeError) as error:
            raise OSError(
                f"the endpoint {self.endpoint} answered without choices[0].message and"
                f" finish_reason ({in_short(reply)}): it must speak OpenAI's chat completions. What"
                " was answered is kept"
            ) from error
        turn = {"role": "assistant", "content": message.get("content") or ""}
        # Servers differ in the name of thoughts, and so do templates.
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        if thoughts:
            turn["reasoning_content"] = thoughts
            turn["thinking"] = thoughts
        if message.get("tool_calls"):
            turn["tool_calls"] = message["tool_calls"]
        return Answer(turn=turn, truncated=truncated)


def in_short(reply: httpx2.Response) -> str:
    """Status and the beginning of a reply, for an error of one line."""
    return f"{reply.status_code}: {' '.join(reply.text.split())[:200]}"

"""What `/metrics` shows to Prometheus, counted by the server, which sees every request and every event."""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()
REQUESTS = Counter(
    "chat_requests",
    "Requests, by the status they ended with, also in a stream; 499: the client has gone.",
    ["status"],
)
ERRORS = Counter("chat_errors", "Requests that failed, before or during the answer.")
TOKENS_IN = Counter("chat_prompt_tokens", "Tokens read.")
TOKENS_OUT = Counter("chat_completion_tokens", "Tokens written.")
FIRST_TOKEN = Histogram(
    "chat_time_to_first_token_seconds",
    "From a request's arrival to the first text of its answer.",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
IN_PROGRESS = Gauge("chat_requests_in_progress", "Requests being answered.")
WAITING = Gauge("chat_queue_length", "Requests that wait for their first token.")

// Server-sent events out of a fetched body: EventSource could not send the API key.

/**
 * The events of a response, as they come: `{comment}` or `{event, data, id}`, absent parts "".
 * Ending the loop early closes the connection.
 */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield parseBlock(block);
    }
  } finally {
    await reader.cancel();
  }
}

function parseBlock(block) {
  if (block.startsWith(":")) return { comment: block.slice(1).trim() };
  const fields = { event: "", data: [], id: "" };
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const name = line.slice(0, colon);
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") fields.data.push(value);
    else if (name === "event" || name === "id") fields[name] = value;
  }
  return { ...fields, data: fields.data.join("\n") };
}

/**
 * The JSON documents of an answer's stream. Comments, which tell of the wait, go to `tell` in
 * words. Throws Error with the server's message where the stream ends in an error.
 */
export async function* readDocuments(response, tell) {
  for await (const { comment, data } of readEvents(response)) {
    if (comment !== undefined) {
      if (!comment.startsWith("granted")) tell(`Waiting: ${comment.replaceAll("=", " ")}`);
      continue;
    }
    if (data === "[DONE]") return;
    if (data === "") continue;
    const document = JSON.parse(data);
    if (document.error) throw new Error(document.error.message);
    yield document;
  }
}

// Shows the OpenAPI document of this server with Swagger UI, with the key of the dashboard.

import { ApiError, ROOT, currentKey, get, useKey } from "../web/api.js";

const form = document.getElementById("key-form");
const field = document.getElementById("key");
const problem = document.getElementById("problem");

// The page allows no text to become markup, and Swagger UI makes markup of descriptions. It cleans
// them first, and they come from this server. The policy of the page still blocks every script and
// event handler in markup.
globalThis.trustedTypes?.createPolicy("default", { createHTML: (markup) => markup });

form.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(field.value.trim());
  field.value = "";
  void show();
});

await show();

async function show() {
  problem.hidden = true;
  let spec;
  try {
    spec = await (await get("/openapi.json")).json();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    form.hidden = error.status !== 401;
    problem.textContent = error.message;
    problem.hidden = false;
    return;
  }
  form.hidden = true;
  spec.servers = [{ url: ROOT.href.replace(/\/$/, "") }];
  const ui = SwaggerUIBundle({
    spec,
    dom_id: "#swagger-ui",
    deepLinking: true,
    docExpansion: "list",
    defaultModelsExpandDepth: 0,
    validatorUrl: null,
    onComplete: () => {
      const key = currentKey();
      if (key) ui.preauthorizeApiKey("bearer", key);
    },
  });
}

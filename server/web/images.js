// Images, with the partial ones on the way.

import { post } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { runOnSubmit } from "./run.js";
import { readDocuments } from "./sse.js";

const PARTIAL_IMAGES = 3; // as many as the endpoint gives

export function startImages() {
  runOnSubmit(byId("images-form"), async (signal, tell) => {
    const prompt = byId("images-prompt").value;
    const image = element("img", { alt: prompt });
    const caption = element("figcaption");
    const figure = element("figure", {}, image, caption);
    const response = await post("/v1/images/generations", fields(prompt), { signal });
    try {
      for await (const event of readDocuments(response, tell)) {
        if (!image.src) byId("images-results").prepend(figure);
        image.src = `data:image/png;base64,${event.b64_json}`;
        if (event.type === "image_generation.partial_image") {
          tell(`Partial image ${event.partial_image_index + 1}`);
        } else {
          const download = `image-${event.seed}.png`;
          setText(caption, `${prompt} (seed ${event.seed}) `);
          caption.append(element("a", { href: image.src, download, textContent: "Download" }));
        }
      }
    } catch (error) {
      figure.remove();
      throw error;
    }
    return "Done.";
  });
}

function fields(prompt) {
  const [steps, seed] = [byId("images-steps").value, byId("images-seed").value];
  return {
    model: byId("images-model").value,
    prompt,
    size: byId("images-size").value,
    ...(byId("images-negative").value && { negative_prompt: byId("images-negative").value }),
    ...(steps && { steps: Number(steps) }),
    ...(seed && { seed: Number(seed) }),
    stream: true,
    partial_images: PARTIAL_IMAGES,
    output_format: "png",
  };
}

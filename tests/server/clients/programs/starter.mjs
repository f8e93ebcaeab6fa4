// What the programs for Node.js know of the server, and the schema of a person.

import { z } from "zod";

export const url = process.env.ROUNDHOUSE_URL;
export const model = "tiny-qwen";
export const embed = "text-embedding-3-small";
export const hello = [{ role: "user", content: "Hello" }];

export const Person = z.object({
  name: z.string().regex(/^[a-z]{1,10}$/),
  age: z.int().min(0).max(150),
  mood: z.enum(["good", "bad"]),
});
export const City = z.object({ city: z.string().regex(/^[a-z]{1,10}$/) });

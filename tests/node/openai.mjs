// The openai package, Responses and Chat. Prints what each call gave, as JSON.
import OpenAI from "openai";

const [baseURL, header, model] = process.argv.slice(2);
const client = new OpenAI({
  baseURL,
  apiKey: "sk-fake-unused",
  maxRetries: 0,
  defaultHeaders: { "X-LlamaStack-Provider-Data": header },
});
const messages = [{ role: "user", content: "Hello" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tool = { name: "weather", parameters, strict: true };
const print = (name, value) => console.log(JSON.stringify([name, value]));

print("responses", (await client.responses.create({ model: `${model}/any`, input: "Hello" })).output_text);

let text = "";
for await (const event of await client.responses.create({ model: `${model}/any`, input: "Hello", stream: true })) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
print("responses stream", text);

const helper = client.responses.stream({ model: `${model}/any`, input: "Hello" });
print("responses helper", (await helper.finalResponse()).output_text);

const tools = [{ type: "function", ...tool }];
const asked = await client.responses.create({ model: `${model}/tool-call`, input: messages, tools });
const output = { type: "function_call_output", call_id: asked.output[0].call_id, output: `21 in ${JSON.parse(asked.output[0].arguments).city}` };
const input = [...messages, ...asked.output, output];
print("responses tool", (await client.responses.create({ model: `${model}/tool-call`, input, tools })).output_text);

print("chat", (await client.chat.completions.create({ model: `${model}/any`, messages })).choices[0].message.content);

text = "";
for await (const chunk of await client.chat.completions.create({ model: `${model}/any`, messages, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
print("chat stream", text);

await client.chat.completions.create({ model: `${model}/status-429`, messages }).catch((error) => print("chat 429", error.status));
await client.responses.create({ model: `${model}/status-429`, input: "Hello" }).catch((error) => print("responses 429", error.status));

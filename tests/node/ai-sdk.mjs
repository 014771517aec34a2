// The AI SDK with each of its providers that can speak to the gateway. Prints what each call gave, as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, header, model] = process.argv.slice(2);
const settings = { baseURL, apiKey: "sk-fake-unused", headers: { "X-LlamaStack-Provider-Data": header } };
const openai = createOpenAI(settings);
const compatible = createOpenAICompatible({ name: "gateway", supportsStructuredOutputs: true, ...settings });
const print = (name, value) => console.log(JSON.stringify([name, value]));

for (const [name, of] of [["default", openai], ["chat", openai.chat], ["compatible", compatible]]) {
  const more = { maxRetries: 0, prompt: "Hello" };
  print(name, (await generateText({ model: of(`${model}/any`), ...more })).text);

  let text = "";
  for await (const delta of streamText({ model: of(`${model}/any`), ...more }).textStream) text += delta;
  print(`${name} stream`, text);

  text = "";
  for await (const delta of streamText({ model: of(`${model}/no-top-logprobs`), onError() {}, ...more }).textStream) text += delta;
  print(`${name} no top_logprobs`, text);

  const cities = [];
  const inputSchema = z.object({ city: z.string() });
  const weather = tool({ inputSchema, execute: async ({ city }) => (cities.push(city), `21 in ${city}`) });
  const steps = { tools: { weather }, stopWhen: stepCountIs(3), onError() {} };
  print(`${name} tool`, (await generateText({ model: of(`${model}/tool-call`), ...steps, ...more })).text);

  text = "";
  for await (const delta of streamText({ model: of(`${model}/tool-call`), ...steps, ...more }).textStream) text += delta;
  print(`${name} streamed tool`, text);

  cities.length = 0;
  await streamText({ model: of(`${model}/tool-calls`), ...steps, ...more }).consumeStream({ onError() {} });
  print(`${name} streamed tools`, cities.sort());

  const output = Output.object({ schema: z.object({ city: z.string(), degrees: z.number() }) });
  print(`${name} object`, (await generateText({ model: of(`${model}/structured`), output, ...more })).output);

  await generateText({ model: of(`${model}/status-429`), ...more }).catch((error) => print(`${name} 429`, error.statusCode));
}

// A client of a vLLM server with lmcache-rag's connector: ingests passages, asks, and checks what was reused.
//
//     node build/client.js URL TOKENIZER_FOLDER QUESTION PASSAGE...
import OpenAI from "openai";
import { type Prompt, Prompts } from "./prompts.js";

export type Statistics = {
  prompt_tokens: number;
  prefix_tokens: number; // an exact prefix
  reused_tokens: number; // taken from cached chunks as they are
  recomputed_tokens: number; // of cached chunks, computed again
  computed_tokens: number; // never cached
  blended: boolean;
  failure: string;
  can_blend?: boolean; // false on a server that cannot blend any prompt; failure says why
};

const [url, folder, question, ...passages] = process.argv.slice(2);
if (!url || !folder || !question || !passages.length) {
  console.error("usage: node build/client.js URL TOKENIZER_FOLDER QUESTION PASSAGE...");
  process.exit(2);
}
const apiKey = process.env.LMCACHE_RAG_API_KEY ?? "none";
const ingestKey = process.env.LMCACHE_RAG_INGEST_KEY; // a server may need it for ingestion
const server = new OpenAI({ baseURL: `${url}/v1`, apiKey });

// What the server runs, and how many tokens an LMCache chunk has.
const card = (await server.models.list()).data.find((each: any) => !each.parent) as any;
const metrics = await (await fetch(`${url}/metrics`, { headers: { Authorization: `Bearer ${apiKey}` } })).text();
const block = Number(/^vllm:lmcache_rag_chunk_tokens\{[^}]*\} (\d+)/m.exec(metrics)?.[1] ?? 64);
const prompts = new Prompts(folder, block, card.max_model_len);

async function send(prompt: Prompt, tokens: number, params: object, headers = {}): Promise<[string, Statistics]> {
  const answer: any = await server.completions.create(
    {
      model: card.id,
      prompt: prompt.ids,
      max_tokens: tokens,
      temperature: 0,
      kv_transfer_params: {
        "lmcache_rag.prefix": prompts.prefix.length,
        "lmcache_rag.chunks": prompt.spans,
        ...params,
      },
    } as OpenAI.CompletionCreateParamsNonStreaming,
    { headers },
  );
  const statistics = answer.kv_transfer_params?.lmcache_rag as Statistics | undefined;
  if (!statistics) throw new Error(`${url} runs without lmcache-rag's connector`);
  const { prefix_tokens, reused_tokens, recomputed_tokens, computed_tokens } = statistics;
  const sum = prefix_tokens + reused_tokens + recomputed_tokens + computed_tokens;
  if (sum !== prompt.ids.length) throw new Error(`the four counts add up to ${sum}, not ${prompt.ids.length} tokens`);
  return [answer.choices[0].text, statistics];
}

for (const passage of passages) {
  const key = ingestKey ? { "X-LMCache-RAG-Ingest-Key": ingestKey } : {};
  const ingest = { "lmcache_rag.ingest": true, "lmcache_rag.blend": "off" };
  const [, { failure, can_blend }] = await send(prompts.ingest(passage), 1, ingest, key);
  if (can_blend === false) console.error(`this server computes every prompt in full: ${failure}`);
  else if (failure) throw new Error(`a passage's KV was not kept: ${failure}`);
}
const [text, statistics] = await send(prompts.query(passages.toReversed(), question), 64, { "lmcache_rag.blend": "on" });
console.log(JSON.stringify({ text, statistics }, null, 2));

// Makes the token ids of prompts as docs/wire-format.md describes, the same as lmcache_rag.PromptBuilder makes.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

const SYSTEM = "You answer questions from the passages that you are given.";
const INSTRUCTION = "Answer the question with the passages below. If they do not hold the answer, say so.";
const HEAD = "\n\nPassages:\n\n"; // between the instruction and the first chunk
const SEPARATOR = "\n\n"; // between two chunks
const QUESTION = "\n\nQuestion: "; // after the last chunk
const FILLER = "\n"; // pads the prefix; one token of the model
const NEUTRAL_TOKENS = 512;
const PASSAGES: string[] = read(new URL("../../../docs/neutral-passages.json", import.meta.url));
const [CHUNKS_MARK, QUESTION_MARK] = ["QXCHUNKSXQ", "QXQUESTIONXQ"]; // where the template puts chunks and question

export type Span = [start: number, end: number];
export type Prompt = { ids: number[]; spans: Span[] };

function read(file: string | URL): any {
  return JSON.parse(readFileSync(file, "utf8"));
}

export class Prompts {
  readonly prefix: number[];
  readonly #neutral: number[];
  readonly #tail: string;
  readonly #template: Tokenizer; // knows special tokens such as <|im_end|>
  readonly #text: Tokenizer; // does not: a document that holds "<|im_end|>" must not end the user's turn
  readonly #control = new Set<number>();

  // folder: the model's tokenizer.json, tokenizer_config.json and chat template. block: tokens of an LMCache chunk.
  constructor(folder: string, block: number, context: number) {
    const [facts, config] = [read(join(folder, "tokenizer.json")), read(join(folder, "tokenizer_config.json"))];
    this.#template = new Tokenizer(facts, config);
    const [spaces, control] = [[] as any[], [] as any[]];
    for (const token of facts.added_tokens) (token.content.trim() ? control : spaces).push(token);
    for (const token of control) this.#control.add(token.id);
    this.#text = new Tokenizer({ ...facts, added_tokens: spaces }, { ...config, added_tokens_decoder: {} });

    const rendered = this.#rendered(folder, config);
    const [before, after] = cut(rendered, CHUNKS_MARK);
    const [instructed, rest] = cut(before, HEAD);
    const [start, end] = [this.#pieces(instructed), this.#pieces(HEAD + rest)];
    const filler = this.text(FILLER);
    if (filler.length !== 1) throw new Error("the filler is not one token of this model: take another one");
    const fillers = modulo(-(start.length + end.length), block);
    this.prefix = [...start, ...Array<number>(fillers).fill(filler[0]!), ...end];
    this.#tail = after;

    const once = PASSAGES.flatMap((passage) => [...this.text(passage), ...this.text("\n\n")]);
    const most = Math.min(Math.ceil(NEUTRAL_TOKENS / block) * block, Math.floor(context / 4 / block) * block);
    const enough = Array<number[]>(Math.ceil(most / once.length)).fill(once).flat();
    this.#neutral = enough.slice(enough.length - most);
  }

  // prefix + neutral passages + chunk
  ingest(chunk: string): Prompt {
    const ids = [...this.prefix, ...this.#neutral];
    const start = ids.length;
    ids.push(...this.text(chunk));
    return { ids, spans: [[start, ids.length]] };
  }

  // prefix + chunk + separator + chunk + ... + question
  query(chunks: string[], question: string): Prompt {
    const [ids, spans] = [[...this.prefix], [] as Span[]];
    for (const chunk of chunks) {
      if (spans.length) ids.push(...this.text(SEPARATOR));
      const start = ids.length;
      ids.push(...this.text(chunk));
      spans.push([start, ids.length]);
    }
    const [before, after] = cut(this.#tail, QUESTION_MARK);
    ids.push(...this.#pieces(before), ...this.text(question), ...this.#pieces(after));
    return { ids, spans };
  }

  // Token ids of a text in which nothing is special.
  text(text: string): number[] {
    const ids = this.#text.encode(text.toWellFormed(), { add_special_tokens: false }).ids;
    if (ids.some((id: number) => this.#control.has(id))) throw new Error("a text became a control token");
    return ids;
  }

  // Token ids of a piece of the chat template.
  #pieces(text: string): number[] {
    return text ? this.#template.encode(text, { add_special_tokens: false }).ids : [];
  }

  // The chat template with marks in the places of chunks and question; the system text is folded into the user's turn
  // where the template has no place for it.
  #rendered(folder: string, config: any): string {
    let source = config.chat_template;
    try {
      source = readFileSync(join(folder, "chat_template.jinja"), "utf8");
    } catch {}
    const named = Object.fromEntries(
      ["bos_token", "eos_token"].map((name) => [name, config[name]?.content ?? config[name] ?? ""]),
    );
    // A date that changed every day would make all KV useless every midnight.
    source = source.replaceAll("strftime_now(", "fixed_date(");
    const fixed = { ...named, add_generation_prompt: true, date_string: "26 Jul 2024", fixed_date: () => "26 Jul 2024" };
    const user = `${INSTRUCTION}${HEAD}${CHUNKS_MARK}${QUESTION}${QUESTION_MARK}`;
    const render = (...messages: { role: string; content: string }[]) => new Template(source).render({ ...fixed, messages });
    try {
      const text = render({ role: "system", content: SYSTEM }, { role: "user", content: user });
      if (text.includes(SYSTEM)) return text;
    } catch {}
    return render({ role: "user", content: `${SYSTEM}\n\n${user}` });
  }
}

function cut(text: string, mark: string): [string, string] {
  const at = text.lastIndexOf(mark);
  if (at < 0) throw new Error(`the chat template leaves ${mark} out`);
  return [text.slice(0, at), text.slice(at + mark.length)];
}

function modulo(value: number, by: number): number {
  return ((value % by) + by) % by;
}

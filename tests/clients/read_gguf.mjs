// Write the probabilities [tokens, vocabulary] that llama.cpp gives after each token, as JSON:
// node read_gguf.mjs NODE GGUF TOKENS OUT
import { writeFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [, , folder, gguf, text, out] = process.argv;
const entry = path.join(folder, "node_modules/node-llama-cpp/dist/index.js");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: gguf, gpuLayers: 0 });
const context = await model.createContext({
    contextSize: 256,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
});
const tokens = JSON.parse(text);
const input = tokens.map((token) => [token, { generateNext: { probabilities: true } }]);
const outputs = await context.getSequence().controlledEvaluate(input);
const rows = outputs.map(({ next }) => {
    const row = new Array(next.probabilities.size);
    for (const [token, probability] of next.probabilities) row[token] = probability;
    return row;
});
writeFileSync(out, JSON.stringify(rows));
process.exit(0);

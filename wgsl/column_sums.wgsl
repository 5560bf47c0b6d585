// Sums over `chunk` rows of each column: a workgroup takes `across` vec4s of columns, `down` invocations share the rows of each.
// What the chunks leave is added up by sum_parts, or, where there are many, by this kernel before. An invocation takes at most
// {{ (chunk + 4 * down - 1) // (4 * down) + 3 }} steps, whose sums it adds up in blocks of {{ block }}.
{# Inside: chunk < chunks; rows read are below end <= rows, columns below used. stats has three rows of a stride of at least `rows`. y has a row
   for each chunk (twice with param_grad) and its own stride as width. lid + s < size, for lid < s <= size / 2. #}
{% include "shared/group" %}
{% set size = across * down %}
{% set parts = ["sum", "dot"] if param_grad else ["sum"] %}
{% if down > 1 %}
{% for part in parts %}
var<workgroup> {{ part }}s: array<vec4<f32>, {{ size }}>;
{% endfor %}
{% endif %}

{% macro load(n, row) %}
            let v{{ n }} = x_load(({{ row }}) * x_stride + col);
{% if param_grad %}
            let d{{ n }} = v{{ n }} * ((input_load(({{ row }}) * input_stride + col) - stats_at({{ row }})) - stats_at(stats_stride + {{ row }})) * stats_at(2u * stats_stride + {{ row }});
{% endif %}
{% endmacro %}

{% macro four(to) %}
{% for n in range(4) %}
{{ load(n, "row + " ~ n * down ~ "u") }}
{% endfor %}
            {{ to }}sum += (v0 + v1) + (v2 + v3);
{% if param_grad %}
            {{ to }}dot += (d0 + d1) + (d2 + d3);
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let group = group_id(wid);
    let chunk = group / {{ tiles }}u;
    let col = group % {{ tiles }}u * {{ across }}u + lid % {{ across }}u;
    if (chunk >= {{ chunks }}u) {
        return;
    }
    var sum = vec4<f32>();
    var dot = vec4<f32>();
    if (col < {{ used }}u) {
        let end = min((chunk + 1u) * {{ chunk }}u, {{ rows }}u);
        var row = chunk * {{ chunk }}u + lid / {{ across }}u;
        // Four rows in flight.
{% set step = 4 * down %}
{% set blocked = chunk > block * step %}
{% if blocked %}
        for (; row + {{ 3 * down }}u < end;) {
            let stop = min(row + {{ block * step }}u, end);
            var part_sum = vec4<f32>();
            var part_dot = vec4<f32>();
            for (; row + {{ 3 * down }}u < stop; row += {{ step }}u) {
{{ four("part_") }}
            }
            sum += part_sum;
            dot += part_dot;
        }
{% else %}
        for (; row + {{ 3 * down }}u < end; row += {{ step }}u) {
{{ four("") }}
        }
{% endif %}
        for (; row < end; row += {{ down }}u) {
{{ load(0, "row") }}
            sum += v0;
{% if param_grad %}
            dot += d0;
{% endif %}
        }
    }
{% if down > 1 %}
{% for part in parts %}
    {{ part }}s[lid] = {{ part }};
{% endfor %}
    for (var s = {{ size // 2 }}u; s >= {{ across }}u; s = s >> 1u) {
        workgroupBarrier();
        if (lid < s) {
{% for part in parts %}
            {{ part }}s[lid] = {{ part }}s[lid] + {{ part }}s[lid + s];
{% endfor %}
        }
    }
    // Below `across` an invocation reads only what it wrote itself.
    if (lid >= {{ across }}u) {
        return;
    }
{% for part in parts %}
    {{ part }} = {{ part }}s[lid];
{% endfor %}
{% endif %}
    if (col >= {{ width }}u) {
        return;
    }
{% if cols % 4 != 0 %}
    let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u);
    sum = select(vec4<f32>(), sum, valid);
    dot = select(vec4<f32>(), dot, valid);
{% endif %}
    y_store(chunk * y_stride + col, sum);
{% if param_grad %}
    y_store(({{ chunks }}u + chunk) * y_stride + col, dot);
{% endif %}
}
